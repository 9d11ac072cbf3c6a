"""Putting a running request's prefix into the radix tree, mid-decode (DESIGN.md: 0.3-0.5 ms on the real engine)."""

from __future__ import annotations

from typing import Any

from specgen_engine import versions
from specgen_engine.scheduler.boundary import Layout, key_tokens, publishable


def insert_fork_point(req: Any, length: int, tree_cache: Any) -> int:
    """Insert the first `length` tokens of a running Req, as far as their KV is committed.

    Returns the tokens that are in the tree afterwards, rounded down to where the model's KV can be cut (boundary.py).
    Under overlap scheduling the newest KV may still be in flight: whatever reads it is launched later on the same
    stream.
    """
    kv = versions.current().kv
    layout = layout_of(tree_cache)
    known = min(kv.committed(req), len(req.origin_input_ids) + len(req.output_ids))
    released = kv.released(req) if layout.window else 0
    end = publishable(length, known, kv.in_tree(req), released, layout)
    if end > kv.in_tree(req):
        kv.publish(req, key_tokens(end, layout), tree_cache)
    return kv.in_tree(req)


def layout_of(tree_cache: Any) -> Layout:
    """How a tree's prefixes are cut."""
    core = getattr(tree_cache, "tree_core", tree_cache)
    window = tree_cache.sliding_window_size if tree_cache.supports_swa() else 0
    return Layout(tree_cache.page_size, window or 0, bool(core.is_eagle))


def holds_kv(req: Any) -> bool:
    """Whether the request has KV of its own that a fork point can publish."""
    return versions.current().kv.held(req) and not req.finished() and not req.is_retracted

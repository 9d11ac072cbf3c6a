"""Forgetting second-level pages in the radix tree, the same way on every rank: the tree and the lost pages decide."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sglang.srt.disaggregation.kv_events import StorageMedium


def evicted_chain(node: Any) -> list[Any]:
    """The nodes from the first that only the second level has, down to `node`."""
    chain: list[Any] = []
    while node.evicted and node.parent is not None:
        chain.insert(0, node)
        node = node.parent
    return chain


def path_of(node: Any) -> list[Any]:
    """The node and its ancestors, without the root."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path


def subtree(node: Any) -> list[Any]:
    """The node and all below it, parents first."""
    nodes = [node]
    for one in nodes:
        nodes.extend(one.children.values())
    return nodes


def is_busy(node: Any) -> bool:
    """Whether a write to, or a storage backend's use of, the node's second-level pages is under way."""
    return node.host_ref_counter > 0 or node.write_through_pending_id is not None


def cut(cache: Any, chain: list[Any], tokens: int) -> Any:
    """Drop what follows the first `tokens` of an evicted chain; the last node that is left, or None.

    Where a storage backend still reads there, nothing is dropped, but nothing further is returned either.
    """
    last = None
    for node in chain:
        if tokens >= len(node.key):
            tokens -= len(node.key)
            last = node
            continue
        if tokens:
            last = cache._split_node(node.key, node, tokens)
        remove(cache, node)
        return last
    return last


def remove(cache: Any, node: Any) -> int:
    """Take an evicted subtree out of the tree and free its pages; 0 when some of it is busy or locked."""
    nodes = subtree(node)
    if any(is_busy(one) or one.lock_ref > 0 or not one.evicted for one in nodes):
        return 0
    freed = 0
    for one in nodes:
        cache._record_remove_event(one, medium=StorageMedium.CPU)
        freed += cache.cache_controller.evict_host(one.host_value)
        one.host_value = None
        cache.evictable_host_leaves.discard(one)
    parent = node.parent
    parent.children.pop(node.key.child_key(cache.page_size))
    cache._update_leaf_status(parent)
    cache._update_host_leaf_status(parent)
    return freed // cache.page_size


def drop(cache: Any, lost: NDArray[np.bool_]) -> int:
    """Forget the copies of lost logical pages; returns how many pages were freed.

    On an evicted node the tokens before the first lost page stay. A node that the GPU holds too loses its copy, with
    those below it, for copies must reach from the root without a gap; it is then written again, to another lender if
    need be. Nodes that are busy or arrive are left for a later step: their pages stay lost and are reported again.

    Nothing is written before all is dropped: a write may need room, which SGLang makes by taking evicted nodes out of
    the tree, and then some that still wait here would be freed twice.
    """
    freed = 0
    written_again: list[Any] = []
    arriving = {one.id for end in cache.ongoing_load_back.values() for one in path_of(end)}
    waiting = list(cache.root_node.children.values())
    while waiting:
        node = waiting.pop()
        if node.backuped and (at := _first_lost(cache, node, lost)) is not None:
            if node.evicted:
                freed += _drop_evicted(cache, node, at)
            else:
                pages, nodes = _drop_resident(cache, node, arriving)
                freed += pages
                written_again.extend(nodes)
        else:
            waiting.extend(node.children.values())
    for node in written_again:
        cache.write_backup(node)
    return freed


def _first_lost(cache: Any, node: Any, lost: NDArray[np.bool_]) -> int | None:
    pages = node.host_value[:: cache.page_size].numpy() // cache.page_size
    found = np.flatnonzero(lost[pages])
    return int(found[0]) * cache.page_size if len(found) else None


def _drop_evicted(cache: Any, node: Any, at: int) -> int:
    if any(is_busy(one) or one.lock_ref > 0 or not one.evicted for one in subtree(node)):
        return 0
    if at:
        cache._split_node(node.key, node, at)  # the first part is a new node, `node` keeps the rest
    return remove(cache, node)


def _drop_resident(cache: Any, node: Any, arriving: set[int]) -> tuple[int, list[Any]]:
    """(pages freed, the nodes that lost their copies, parents first)."""
    nodes = subtree(node)
    if any(one.id in arriving or (one.backuped and is_busy(one)) for one in nodes):
        return 0, []
    freed = 0
    evicted_tops = [one for one in nodes if one.evicted and not one.parent.evicted]
    for top in evicted_tops:
        freed += remove(cache, top)
    resident = [one for one in nodes if not one.evicted and one.backuped]
    for one in resident:
        freed += cache.cache_controller.evict_host(one.host_value) // cache.page_size
        one.host_value = None
        cache._update_host_leaf_status(one)
    cache._update_host_leaf_status(node.parent)
    return freed, resident

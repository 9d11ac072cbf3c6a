"""The KV of a draft (EAGLE, MTP) rides in the target's pages: a restore brings what the draft attends to, too.

SGLang's draft worker has a pool of its own, which the target's allocator gives indices to: a page of tokens is the same
page of both. So its buffers are further planes of the last layer's; tags, revocation, losses and books stay as they
are. SGLang runs the draft behind the target, whose last layer waits for the launch that brings both.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from specgen_engine.tier.base import PageShape, TierError, page_shape

logger = logging.getLogger(__name__)

REMEMBERED = "specgen_draft_pool"  # attribute of the target's worker


class Kept(NamedTuple):
    """What is moved: pages of `shape`; `draft` is None where it has none of a draft's."""

    shape: PageShape
    draft: Any
    layers: int


def remember(worker: Any, pool: Any) -> None:
    """Of the target's worker: the pool of its draft, until the radix cache is made."""
    setattr(worker, REMEMBERED, pool)


def kept_beside(shape: PageShape, pool: Any, worker: Any) -> Kept:
    """The target's pages with its draft's layers, or without where those do not fit: outputs are the target's anyway.

    Args:
        shape: of the target's pages.
        pool: the target's.
        worker: the target's; its draft's pool is remembered there, or it has no draft.
    """
    draft = getattr(worker, REMEMBERED, None)
    if draft is None:
        return Kept(shape, None, 0)
    try:
        beside = page_shape(draft, shape.page_size)
        if draft.size < pool.size:
            raise TierError(f"the draft's pool has {draft.size} tokens, the target's {pool.size}")
    except TierError as error:
        logger.warning("the draft's KV is not kept, its guesses are worse after a restore: %s", error)
        return Kept(shape, None, 0)
    return Kept(joined(shape, beside), draft, beside.layers)


def joined(shape: PageShape, draft: PageShape) -> PageShape:
    """Pages of both pools, the draft's planes behind those of the target's last layer."""
    widths = list(shape.widths) or [shape.planes_per_layer] * shape.layers
    widths[-1] += len(draft.planes)
    return PageShape([*shape.planes, *draft.planes], max(widths), shape.page_size, tuple(widths))

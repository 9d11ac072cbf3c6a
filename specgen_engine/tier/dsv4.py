"""DeepSeek-V4's pool: what a page of each of its index spaces is made of.

SGLang finds its parts by two index spaces. `tokens`: blocks of 4 and of 128 tokens with their index keys. `window`: the
uncompressed keys, which are freed behind the sliding window, and the raw scores of blocks of 4, found by the same
pages. Scores of blocks of 128 belong to a request's slot and are empty at a page's end, so that no copy holds them.
A page of 256 tokens of either space is one page of an arena, with planes of all its buffers.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from specgen_engine.kv.native import _kv
from specgen_engine.tier.base import PageShape, TierError, plane_of
from specgen_engine.tier.drafts import REMEMBERED, joined

logger = logging.getLogger(__name__)

POOL = "DeepSeekV4TokenToKVPool"
KV_POOL = "DeepSeekV4SingleKVPool"
WINDOW_OF_BLOCK_128 = 128


class Space(NamedTuple):
    """One index space of a device pool, as ArenaPool and the start-up probe take a pool.

    `layers`: the model's layers that have planes in it, counted from this rank's first. `tier_buffers`: in the order of
    the planes. `size`: tokens.
    """

    name: str
    shape: PageShape
    layers: tuple[int, ...]
    tier_buffers: list[torch.Tensor]
    size: int
    device: Any
    store_dtype: torch.dtype
    start_layer: int
    end_layer: int


def spaces_of(pool: Any, page_size: int, tokens: int) -> tuple[Space, Space]:
    """(tokens, window) of a pool with `tokens` tokens. Raises TierError for a layout that the tier does not serve."""
    _refuse(pool, page_size)
    full: list[list[tuple[torch.Tensor, int]]] = []
    window: list[list[tuple[torch.Tensor, int]]] = []
    for layer in range(pool.start_layer, pool.end_layer):
        item, local = pool.layer_mapping[layer], layer - pool.start_layer
        blocks, parts = [], [(pool.swa_kv_pool.kv_buffer[local], 1)]
        if item.compress_ratio:
            blocks.append((item.compress_kv_pool.kv_buffer[item.compress_layer_id], 1))
        if item.compress_ratio == 4:
            blocks.append((pool.c4_indexer_kv_pool.index_k_with_scale_buffer[item.compress_layer_id], 1))
            for states in (pool.compress_state_pools[layer], pool.indexer_compress_state_pools[layer]):
                parts.append((states.kv_score_buffer.kv_score, states.ring_size))
        full.append(blocks)
        window.append(parts)
    return _space(pool, "tokens", full, page_size, tokens), _space(pool, "window", window, page_size, pool.swa_size)


def _refuse(pool: Any, page_size: int) -> None:
    other = "use --specgen-kv host or off"
    if getattr(pool, "_unified_kv", False):
        raise TierError(f"--specgen-kv: {POOL} with window and blocks in one buffer is not supported: {other}")
    if type(pool.c4_kv_pool).__name__ != KV_POOL:
        raise TierError(f"--specgen-kv: blocks of 4 in a {type(pool.c4_kv_pool).__name__} are not supported: {other}")
    if page_size != pool.swa_page_size or page_size % WINDOW_OF_BLOCK_128:
        raise TierError(
            f"--page-size {page_size}: the remote KV tier serves {POOL} with pages that are a multiple of "
            f"{WINDOW_OF_BLOCK_128} tokens and the window's {pool.swa_page_size}: use 256"
        )


def _space(
    pool: Any, name: str, parts: list[list[tuple[torch.Tensor, int]]], page_size: int, tokens: int
) -> Space:  # fmt: skip
    """`parts`: of each layer, its buffers and how many rows of each are a page."""
    held = [(layer, buffers) for layer, buffers in enumerate(parts) if buffers]
    planes: list[_kv.Plane] = []
    tensors: list[torch.Tensor] = []
    for _, buffers in held:
        for buffer, rows in buffers:
            if len(buffer) // rows < tokens // page_size + 1:
                raise TierError(
                    f"--specgen-kv: a {name} buffer of {POOL} has {len(buffer) // rows} pages for {tokens} tokens: "
                    "use --specgen-kv host or off"
                )
            planes.append(plane_of(buffer, rows))
            tensors.append(buffer)
    if not planes:
        raise TierError(f"--specgen-kv: no layer of this {POOL} has {name} KV: use --specgen-kv host or off")
    widths = tuple(len(buffers) for _, buffers in held)
    shape = PageShape(planes, max(widths), page_size, widths)
    layers = tuple(layer for layer, _ in held)
    return Space(
        name, shape, layers, tensors, tokens, pool.device, pool.store_dtype, pool.start_layer, pool.end_layer
    )  # fmt: skip


def window_with_draft(window: Space, pool: Any, worker: Any, page_size: int) -> tuple[Space, int]:
    """(the window's pages with the MTP draft's keys behind the last layer's planes, layers of the draft).

    SGLang's NextN layer (compress ratio 0) has window keys only, in a pool of its own that the target's window pages
    index. Without them where that does not hold: outputs are the target's anyway.
    """
    draft = getattr(worker, REMEMBERED, None)
    if draft is None:
        return window, 0
    try:
        beside = _window_of(draft, pool, page_size, window)
    except TierError as error:
        logger.warning("the draft's KV is not kept, its guesses are worse after a restore: %s", error)
        return window, 0
    buffers = [*window.tier_buffers, *beside.tier_buffers]
    return window._replace(shape=joined(window.shape, beside.shape), tier_buffers=buffers), len(beside.layers)


def _window_of(draft: Any, pool: Any, page_size: int, window: Space) -> Space:
    if not is_dsv4(draft):
        raise TierError(f"its pool is a {type(draft).__name__}, the target's a {POOL}")
    ratios = [item.compress_ratio for item in draft.layer_mapping[draft.start_layer : draft.end_layer]]
    if any(ratios):
        raise TierError(f"its layers have compressed blocks (ratios {ratios}), the tier keeps window keys")
    if draft.swa_page_size != page_size or draft.swa_size < window.size:
        raise TierError(
            f"its window has {draft.swa_size} tokens in pages of {draft.swa_page_size}, the target's {window.size} "
            f"in pages of {page_size}"
        )
    if draft.full_to_swa_index_mapping is not pool.full_to_swa_index_mapping:
        raise TierError("its window pages are not found by the target's indices")
    keys = [[(buffer, 1)] for buffer in draft.swa_kv_pool.kv_buffer]
    return _space(draft, "window", keys, page_size, window.size)


def is_dsv4(pool: Any) -> bool:
    return type(pool).__name__ == POOL

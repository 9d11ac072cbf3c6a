"""DeepSeek-V4's pool: what a page of each of its index spaces is made of.

SGLang finds its parts by two index spaces. `tokens`: blocks of 4 and of 128 tokens with their index keys. `window`: the
uncompressed keys, which are freed behind the sliding window, and the raw scores of blocks of 4, found by the same
pages. Scores of blocks of 128 belong to a request's slot and are empty at a page's end, so that no copy holds them.
A page of 256 tokens of either space is one page of an arena, with planes of all its buffers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from specgen_engine.kv.native import _kv
from specgen_engine.tier.base import PageShape, TierError, plane_of

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


def is_dsv4(pool: Any) -> bool:
    return type(pool).__name__ == POOL

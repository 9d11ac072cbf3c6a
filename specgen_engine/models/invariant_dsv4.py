"""DeepSeek-V4's attention by one kernel for prefill and decoding, each token apart (see invariant.py).

SGLang decodes with flash_mla_with_kvcache, which splits a token's keys among processors by how many tokens the batch
has and adds the parts, and prefills with flash_mla_sparse_fwd, which does not. Here both are the latter, over a
workspace in which every token's keys lie once: window and compressed ones, dequantized. Slow, for comparisons only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ENVIRONMENT = {"SGLANG_OPT_FLASHMLA_SPARSE_PREFILL": "0"}
"""Prefill calls flash_mla_with_kvcache too, which is replaced here."""
CHUNK = 256
"""Tokens whose keys are laid out at once: 640 keys of 1 KiB each."""
KEYS_OF_A_BLOCK = 128
"""flash_mla_sparse_fwd takes keys by so many."""

Dequantize = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
Attend = Callable[..., tuple[torch.Tensor, ...]]


def enable() -> None:
    """In a scheduler whose model is DeepSeek-V4, before it decodes."""
    import sgl_kernel.flash_mla as flash_mla
    from sglang.kernels.ops.attention.dsv4.dequant_k_cache import dequantize_k_cache_paged
    from sglang.srt.layers.attention.deepseek_v4_backend import DSV4AttnMetadata
    from sglang.srt.layers.attention.dsv4.indexer import C4IndexerBackendMixin
    from sglang.srt.models import deepseek_v4
    from sglang.srt.models.deepseek_v2 import MoEGate

    if getattr(C4IndexerBackendMixin.forward_c4_indexer, "__wrapped__", None) is not None:
        return
    flash_mla.flash_mla_with_kvcache = each_token_apart(flash_mla.flash_mla_sparse_fwd, dequantize_k_cache_paged)
    DSV4AttnMetadata.init_flashmla_related = with_positions(DSV4AttnMetadata.init_flashmla_related)
    C4IndexerBackendMixin.forward_c4_indexer = in_order(C4IndexerBackendMixin.forward_c4_indexer)
    MoEGate.forward = in_float32(MoEGate.forward)
    deepseek_v4.compile_in_capture_mode = as_it_is


def with_positions(original: Callable[..., None]) -> Callable[..., None]:
    """Around DSV4AttnMetadata.init_flashmla_related: the chosen keys' positions are kept in decoding too."""

    def init_flashmla_related(metadata: Any, is_prefill: bool = False) -> None:
        original(metadata, is_prefill=True)

    return init_flashmla_related


def in_order(original: Callable[..., None]) -> Callable[..., None]:
    """Around forward_c4_indexer: the chosen keys by ascending position, not as threads found them."""

    def forward_c4_indexer(backend: Any, *args: Any, **kwargs: Any) -> None:
        original(backend, *args, **kwargs)
        chosen = backend.forward_metadata.core_attn_metadata
        slots, positions = chosen.c4_sparse_page_indices, chosen.c4_sparse_raw_indices
        slots.copy_(by_position(slots, positions, chosen.c4_sparse_topk_lengths))

    forward_c4_indexer.__wrapped__ = original  # type: ignore[attr-defined]
    return forward_c4_indexer


def in_float32(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Around MoEGate.forward, whose deterministic path returns bfloat16, which the kernel that takes experts by a
    token's hash refuses: the same logits as float32."""

    def forward(gate: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(gate, *args, **kwargs).float()

    return forward


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """For compile_in_capture_mode, by which decoding alone mixes the residual streams in a compiled kernel, whose sums
    round otherwise than prefill's operators do."""
    return function


def by_position(slots: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(tokens, keys) slots, of which the first `lengths` of each token count, by their positions; -1 behind them."""
    counts = torch.arange(slots.shape[1], device=slots.device) < lengths[:, None]
    order = positions.masked_fill(~counts, torch.iinfo(positions.dtype).max).argsort(dim=-1, stable=True)
    return slots.masked_fill(~counts, -1).gather(1, order)


def each_token_apart(sparse_attention: Attend, dequantize: Dequantize) -> Attend:
    """What takes the place of flash_mla_with_kvcache, for DeepSeek-V4's caches.

    sparse_attention: flash_mla_sparse_fwd. dequantize: (pages, bytes of a page) cache, slots and slots of a page to
    (slots, 1, width) bfloat16.
    """

    def attend(
        q: torch.Tensor, k_cache: torch.Tensor, *_: Any, softmax_scale: float, head_dim_v: int, attn_sink: torch.Tensor,
        indices: torch.Tensor, topk_length: torch.Tensor, extra_k_cache: torch.Tensor | None = None,
        extra_indices_in_kvcache: torch.Tensor | None = None, extra_topk_length: torch.Tensor | None = None, **__: Any,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        regions = [(k_cache, indices, topk_length)]
        if extra_k_cache is not None and extra_indices_in_kvcache is not None and extra_topk_length is not None:
            regions.insert(0, (extra_k_cache, extra_indices_in_kvcache, extra_topk_length))
        slots = [those_that_count(indices.flatten(1), lengths) for _, indices, lengths in regions]
        parts = []
        for start in range(0, len(q), CHUNK):
            chunk = slice(start, start + CHUNK)
            kv = [dequantized(cache, each[chunk], dequantize) for (cache, *_), each in zip(regions, slots, strict=True)]
            valid = torch.cat([each[chunk] for each in slots], dim=1) >= 0
            keys = torch.cat(kv, dim=1)
            asked = (q[chunk].squeeze(1), keys.flatten(0, 1).unsqueeze(1), padded(gathered(valid)))
            out = sparse_attention(
                q=asked[0], kv=asked[1], indices=asked[2].unsqueeze(1), sm_scale=softmax_scale, d_v=head_dim_v,
                attn_sink=attn_sink,
            )  # fmt: skip
            parts.append(out[0])
        return (torch.cat(parts).unsqueeze(1),)

    return attend


def those_that_count(slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(tokens, keys) slots; -1 for what is behind a token's length."""
    return slots.masked_fill(torch.arange(slots.shape[1], device=slots.device) >= lengths[:, None], -1)


def gathered(valid: torch.Tensor) -> torch.Tensor:
    """(tokens, keys) int32 numbers of the keys that count, in their order, -1 behind them: regions are wider in a
    decode graph than in prefill, and the kernel sums by blocks of keys."""
    at = torch.arange(valid.numel(), dtype=torch.int32, device=valid.device).view(valid.shape)
    first = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    return at.masked_fill(~valid, -1).gather(1, first)


def padded(indices: torch.Tensor) -> torch.Tensor:
    """With so many -1 that whole blocks of keys are asked for."""
    return torch.nn.functional.pad(indices, (0, -indices.shape[1] % KEYS_OF_A_BLOCK), value=-1)


def dequantized(cache: torch.Tensor, slots: torch.Tensor, dequantize: Dequantize) -> torch.Tensor:
    """(tokens, keys, width) of a (pages, slots of a page, 1, bytes) view of a cache whose pages may be padded."""
    pages, page_size = cache.shape[:2]
    whole = cache.as_strided((pages, cache.stride(0)), (cache.stride(0), 1))
    keys = dequantize(whole, slots.clamp(min=0).flatten().contiguous(), page_size)
    return keys.view(*slots.shape, keys.shape[-1])

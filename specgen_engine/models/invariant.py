"""SGLang's batch-invariant operators for both models, so that a comparison is of forks and not of batch sizes.

--enable-deterministic-inference refuses the dsa backend. GLM-5's sparse attention computes each token apart, in prefill
and decoding by the same kernel; matrix products, the router and the experts' sums are what batches of other sizes
compute otherwise, and those SGLang has operators for. One thing is left: behind 2,048 tokens the indexer's choice comes
in the order in which threads found it (atomicAdd, in the fused kernels of prefill and of decoding), and attention sums
in that order. Here it is put in the order of positions before it is turned into slots of the pool. DeepSeek-V4 has
another attention: invariant_dsv4.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from specgen_engine.models import invariant_dsv4

SWITCH = "SPECGEN_BATCH_INVARIANT"
# DeepGEMM's product is compiled anew for many shapes; Triton's once a type.
ENVIRONMENT = {SWITCH: "1", "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_DEEPGEMM": "0", **invariant_dsv4.ENVIRONMENT}


def enable_if_asked(model: torch.nn.Module) -> None:
    """In a scheduler, before its model's weights are made: what SGLang decides after that, it decides as if
    --enable-deterministic-inference were set. Nothing without SPECGEN_BATCH_INVARIANT=1."""
    if os.environ.get(SWITCH) != "1":
        return
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend
    from sglang.srt.runtime_context import get_context

    get_context().override("specgen", enable_deterministic_inference=True)
    if getattr(DSATopKBackend.topk_transform, "__wrapped__", None) is None:
        DSATopKBackend.topk_transform = in_order(DSATopKBackend.topk_transform)
    if type(model).__name__.startswith("DeepseekV4"):
        invariant_dsv4.enable()


def in_order(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Around SGLang's DSATopKBackend.topk_transform: the (tokens, chosen) int32 slots that it returns, by ascending
    position, -1 behind them. What is no choice of slots in a page table (fp8's ragged prefill) is left to it."""
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod

    def topk_transform(
        backend: Any, logits: torch.Tensor, lengths: torch.Tensor, topk: int, topk_transform_method: Any,
        attn_metadata: Any, cu_seqlens_q_topk: torch.Tensor | None = None, row_starts: torch.Tensor | None = None,
        batch_idx_list: Any = None, force_unfused_topk: bool = False, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        if force_unfused_topk or topk_transform_method != TopkTransformMethod.PAGED:
            asked = (logits, lengths, topk, topk_transform_method, attn_metadata, cu_seqlens_q_topk)
            return original(
                backend, *asked, row_starts=row_starts, batch_idx_list=batch_idx_list,
                force_unfused_topk=force_unfused_topk, **others,
            )  # fmt: skip
        chosen = ascending(backend.topk_func(logits, lengths, topk, row_starts=row_starts))
        rows = requests_of(len(chosen), cu_seqlens_q_topk, batch_idx_list, chosen.device)
        if attn_metadata.page_table_1 is not None:
            return slots_of(chosen, rows, attn_metadata.page_table_1, 1)
        return slots_of(chosen, rows, attn_metadata.real_page_table, attn_metadata.page_size)

    topk_transform.__wrapped__ = original  # type: ignore[attr-defined]
    return topk_transform


def ascending(positions: torch.Tensor) -> torch.Tensor:
    """(tokens, chosen) positions in their order, the -1 of rows with fewer at their end."""
    none = torch.iinfo(positions.dtype).max
    ordered = positions.masked_fill(positions < 0, none).sort(dim=-1).values
    return ordered.masked_fill(ordered == none, -1)


def requests_of(tokens: int, cu_seqlens_q: torch.Tensor | None, requests: Any, device: torch.device) -> torch.Tensor:
    """Which row of the page table each token reads, as SGLang's own kernels take it: `requests` names rows for runs of
    tokens (or each), whose ends `cu_seqlens_q` counts; without both a token's own row."""
    rows = None if requests is None else torch.as_tensor(requests, device=device).long()
    if rows is not None and len(rows) == tokens:
        return rows
    if cu_seqlens_q is None or (rows is None and len(cu_seqlens_q) - 1 == tokens):
        return torch.arange(tokens, device=device)
    lengths = (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).long()
    rows = torch.arange(len(lengths), device=device) if rows is None else rows
    return torch.repeat_interleave(rows, lengths, output_size=tokens)


def slots_of(positions: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, page: int) -> torch.Tensor:
    """Slots of (tokens, chosen) positions by a table of pages of so many tokens, -1 for -1; int32."""
    at = positions.clamp(min=0).long()
    slots = table[rows[:, None], at // page] * page + at % page
    return slots.masked_fill(positions < 0, -1).to(torch.int32)

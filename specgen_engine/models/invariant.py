"""SGLang's batch-invariant operators for GLM-5, so that a comparison is of forks and not of batch sizes.

--enable-deterministic-inference refuses the dsa backend. Its sparse attention computes each token apart, in prefill and
decoding by the same kernel; matrix products, the router and the experts' sums are what batches of other sizes compute
otherwise, and those SGLang has operators for. One thing is left: behind 2,048 tokens the indexer's choice comes in the
order in which threads found it (atomicAdd, in the fused kernels of prefill and of decoding), and attention sums in that
order. So the choice is taken from the kernel that names positions, and put in their order.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

SWITCH = "SPECGEN_BATCH_INVARIANT"
# DeepGEMM's product is compiled anew for many shapes; Triton's once a type. The fused choice names slots of the pool,
# whose order says nothing: unfused it names positions.
ENVIRONMENT = {SWITCH: "1", "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_DEEPGEMM": "0", "SGLANG_DSA_FUSE_TOPK": "0"}


def enable_if_asked() -> None:
    """In a scheduler, before its model's weights are made: what SGLang decides after that, it decides as if
    --enable-deterministic-inference were set. Nothing without SPECGEN_BATCH_INVARIANT=1."""
    if os.environ.get(SWITCH) != "1":
        return
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend
    from sglang.srt.runtime_context import get_context

    get_context().override("specgen", enable_deterministic_inference=True)
    if getattr(DSATopKBackend.topk_func, "__wrapped__", None) is None:
        DSATopKBackend.topk_func = in_order(DSATopKBackend.topk_func)


def in_order(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Around SGLang's choice of (tokens, chosen) int32 positions: ascending, the -1 of rows with fewer at their end."""

    def chosen(*args: Any, **kwargs: Any) -> torch.Tensor:
        positions = choose(*args, **kwargs)
        none = torch.iinfo(positions.dtype).max
        ordered = positions.masked_fill(positions < 0, none).sort(dim=-1).values
        return ordered.masked_fill(ordered == none, -1)

    chosen.__wrapped__ = choose  # type: ignore[attr-defined]
    return chosen

"""DeepSeek-V4's hyper-connection mixing without TileLang, which SGLang has no other kernel for.

Manifold-constrained hyper-connections (arXiv 2512.24880): a token's `hc` residual streams are mixed by a matrix that
Sinkhorn's iteration makes doubly stochastic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch


class Mixing(NamedTuple):
    """(batch, length, hc) weights into and out of the block, and (batch, length, hc, hc) between the streams."""

    pre: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor


def hc_split_sinkhorn(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's TileLang kernel: its own where TileLang is installed."""
    return original(*args, **kwargs) if _has_tilelang() else mix(*args, **kwargs)


def mix(
    mixes: torch.Tensor,
    hc_scale: torch.Tensor,
    hc_base: torch.Tensor,
    hc_mult: int = 4,
    sinkhorn_iters: int = 20,
    eps: float = 1e-6,
) -> Mixing:
    """Split (batch, length, (2 + hc) * hc) float32 `mixes`, scaled by three numbers and shifted by hc_base."""
    base = hc_base.split([hc_mult, hc_mult, hc_mult * hc_mult])
    parts = mixes.split([hc_mult, hc_mult, hc_mult * hc_mult], dim=-1)
    into, out, between = (part * hc_scale[i] + base[i] for i, part in enumerate(parts))
    comb = between.unflatten(-1, (hc_mult, hc_mult)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(sinkhorn_iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return Mixing(into.sigmoid() + eps, 2 * out.sigmoid(), comb)


@cache
def _has_tilelang() -> bool:
    return find_spec("tilelang") is not None

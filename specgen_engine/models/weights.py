"""Random weights that a comparison can rest on.

SGLang's dummy weights are uniform in +-0.001 with one seed for every parameter, norms included: activations vanish and
a token hardly depends on what stands before it, so that wrong KV would go unnoticed. These keep every activation near
one, differ by parameter, and are the same on every rank that holds the whole parameter.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any

import torch

from specgen_engine.models import invariant

SWITCH = "SPECGEN_DUMMY_WEIGHTS"
SCALED = "scaled"
LOGITS = 0.3  # of the output head: a tie between tokens stays rarer than rounding


def initialize(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Around SGLang's initialize_dummy_weights: scaled weights with SPECGEN_DUMMY_WEIGHTS=scaled, else its own."""
    invariant.enable_if_asked(model)
    if os.environ.get(SWITCH) != SCALED:
        original(model, *args, **kwargs)
        return
    for name, parameter in model.state_dict().items():
        if torch.is_floating_point(parameter):
            fill(name, parameter)


def fill(name: str, parameter: torch.Tensor) -> None:
    """Uniform values whose seed is the name's: norms near 1, matrices by their fan-in, all else small."""
    generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(name.encode()))
    middle, width = spread(name, tuple(parameter.shape))
    values = parameter.data
    if torch.finfo(values.dtype).bits < 16:
        values = values.to(torch.bfloat16)
    values.uniform_(middle - width, middle + width, generator=generator)
    if values is not parameter.data:
        parameter.data.copy_(values.to(parameter.dtype))


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(middle, half width) of a parameter's values."""
    if len(shape) < 2:
        return (1.0, 0.1) if "norm" in name or name.endswith("scale") else (0.0, 0.05)
    if "embed_tokens" in name:
        return 0.0, 3**0.5
    gain = LOGITS if "lm_head" in name else 1.0
    return 0.0, gain * (3 / shape[-1]) ** 0.5

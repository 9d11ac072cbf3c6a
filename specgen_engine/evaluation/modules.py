"""Importing a module from text, running its model; shared by the judge's process and the candidate's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .clock import Clock
from .tensors import map_tensors, tensors_of

PLACES = 5
PLACED_BYTES = 128 << 20
"""Inputs that take more lie over so much memory that another place makes no difference."""


def load_module(source: str, name: str, folder: Path) -> ModuleType:
    """Import source as a file of its own (Triton reads kernels back from their file). Raises what the module raises."""
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def construct(module: ModuleType, entry: str, init_inputs: Sequence[Any], seed: int, device: str) -> Any:
    """Build entry(*init_inputs) under a seed and move it to the device, as KernelBench does."""
    torch.manual_seed(seed)
    model = getattr(module, entry)(*init_inputs)
    return model.to(device) if isinstance(model, torch.nn.Module) else model


class TimedCalls:
    """Calls on working buffers whose contents are replaced before every call: addresses repeat, contents do not."""

    def __init__(self, model: Any, sources: dict[int, list[Any]], clock: Clock) -> None:
        self.model, self.sources, self.clock = model, sources, clock
        self._places = [map_tensors(next(iter(sources.values())), torch.clone)]
        self._work_at(0)

    def _work_at(self, place: int) -> None:
        self._place = place
        self.working = self._places[place]
        self._flat = tensors_of(self.working)

    def move(self) -> None:
        """Work elsewhere in memory: up to PLACES places, all kept so that none lies on another, then by turns."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self._flat)
        if len(self._places) < PLACES and held <= PLACED_BYTES:
            try:
                self._places.append(map_tensors(self.working, torch.clone))
                self._place = len(self._places) - 2
            except RuntimeError:  # no memory for another: those at hand do
                pass
        self._work_at((self._place + 1) % len(self._places))

    def run(self, sequence: Sequence[int], call: Any) -> tuple[list[int], Any]:
        """Times of call(*inputs), one for each slot named in sequence, in ns; and the last result."""
        times: list[int] = []
        result: Any = None
        for slot in sequence:
            result = None
            self.clock.lead()
            for target, origin in zip(self._flat, tensors_of(self.sources[slot]), strict=True):
                target.copy_(origin)
            elapsed, result = self.clock.time(lambda: call(*self.working))
            times.append(elapsed)
        return times, result


def shares_memory(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> bool:
    """Does any output live in the storage of an input?"""
    origins = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
    return any(tensor.untyped_storage().data_ptr() in origins for tensor in outputs if tensor.numel())

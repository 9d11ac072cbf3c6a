"""From a candidate's text to a module with ModelNew, in the candidate's own process."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..modules import load_module
from .forms import Interface, is_cuda_text, python_interface, solution_of


def load_candidate(source: str, folder: Path, device: str) -> ModuleType:
    """Import or compile a candidate. Raises what its code or its compiler raises."""
    if is_cuda_text(source):
        from .plain_cuda import load_plain_cuda

        return load_plain_cuda(source, folder, device)
    solution = solution_of(source)
    if solution is not None:
        from .solution import load_solution

        return load_solution(solution, folder)
    module = load_module(source, "candidate", folder)
    interface = python_interface(source)
    if interface is Interface.GPU_MODE:
        return _module_of(lambda *_: GpuModeModel(module.custom_kernel))
    if interface is Interface.FUNCTION:
        from .solution import FunctionModel

        return _module_of(lambda definition=None, *_: FunctionModel(module.run, definition, in_place=False))
    return module


class GpuModeModel:
    """A GPU MODE submission as a model: one argument, the task's data."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *data: Any) -> Any:
        return self.function(data[0] if len(data) == 1 else data)


def _module_of(model: Any) -> ModuleType:
    module = ModuleType("candidate_adapter")
    module.ModelNew = model  # type: ignore[attr-defined]
    return module


def give_weights(model: Any, read: Any) -> None:
    """The reference's weights where names and shapes agree; a model with take_weights() picks what it wants.

    read: makes a fresh copy of them, {name: tensor}.
    """
    if not isinstance(model, torch.nn.Module):
        if hasattr(model, "take_weights"):
            model.take_weights(read())
        return
    given, own = read(), model.state_dict()
    if own and own.keys() == given.keys() and all(own[key].shape == given[key].shape for key in own):
        model.load_state_dict(given)

"""FlashInfer Trace solutions and functions as models: called in the definition's order, results as tensors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..tasks.definition import as_results, make_outputs
from .solution_spec import SolutionSpec, parse_solution

PACKAGE = "candidate_solution"


class FunctionModel:
    """A function over a definition's inputs. in_place: it fills outputs that come as its last arguments.

    definition: what the task's reference is constructed with (tasks/flashinfer.py). Without one the results are
    returned as they are.
    """

    def __init__(self, function: Callable[..., Any], definition: dict[str, Any] | None, *, in_place: bool) -> None:
        self.function, self.definition, self.in_place = function, definition, in_place
        if in_place and definition is None:
            raise ValueError("a solution that fills its outputs needs a FlashInfer Trace task, which declares them")

    def __call__(self, *inputs: Any) -> Any:
        if self.definition is None:
            return self.function(*inputs)
        if not self.in_place:
            return as_results(self.definition, self.function(*inputs), inputs)
        outputs = make_outputs(self.definition, inputs)
        self.function(*inputs, *outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def load_solution(solution: dict[str, Any], folder: Path) -> ModuleType:
    """Build a Solution. Raises SolutionError, or what its import or compiler raises."""
    spec = parse_solution(solution)
    root = folder / PACKAGE
    for path, content in spec.sources.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    function = _python_function(spec, folder) if spec.file.endswith(".py") else _compiled_function(spec, root)
    module = ModuleType("candidate_adapter")
    module.ModelNew = lambda definition=None, *_: FunctionModel(  # type: ignore[attr-defined]
        function, definition, in_place=spec.in_place
    )
    return module


def _python_function(spec: SolutionSpec, folder: Path) -> Callable[..., Any]:
    """Imported as a package of its own, with its folder on the path, as FlashInfer-Bench does."""
    sys.path[:0] = [str(folder), str(folder / PACKAGE)]
    module = importlib.import_module(".".join([PACKAGE, *Path(spec.file).with_suffix("").parts]))
    return _function_of(module, spec)


def _function_of(module: Any, spec: SolutionSpec) -> Callable[..., Any]:
    function = getattr(module, spec.symbol, None)
    if not callable(function):
        raise AttributeError(f"{spec.file} defines no {spec.symbol}")
    return function


def _compiled_function(spec: SolutionSpec, root: Path) -> Callable[..., Any]:
    files = [str(root / path) for path in spec.sources if path.endswith((".cu", ".cpp", ".cc", ".cxx"))]
    build = Path(os.environ.get("TORCH_EXTENSIONS_DIR", root)) / PACKAGE
    build.mkdir(parents=True, exist_ok=True)
    if spec.binding == "torch":
        from torch.utils.cpp_extension import load

        module = load(PACKAGE, files, extra_include_paths=[str(root)], build_directory=str(build), verbose=False)
        return _function_of(module, spec)
    tvm_ffi = importlib.import_module("tvm_ffi")
    library = tvm_ffi.cpp.build(
        name=PACKAGE,
        cpp_files=[file for file in files if not file.endswith(".cu")],
        cuda_files=[file for file in files if file.endswith(".cu")],
        extra_include_paths=[str(root)],
        build_directory=str(build),
    )
    return _on_torch_stream(_function_of(tvm_ffi.load_module(library), spec), tvm_ffi)


def _on_torch_stream(function: Callable[..., Any], tvm_ffi: Any) -> Callable[..., Any]:
    """Kernels of a tvm-ffi module run on the stream that its environment names."""

    def call(*arguments: Any) -> Any:
        if not torch.cuda.is_initialized():
            return function(*arguments)
        with tvm_ffi.use_torch_stream():
            return function(*arguments)

    return call

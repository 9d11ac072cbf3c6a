"""The judge's side of a FlashInfer Trace task: inputs by workload, the definition's reference, results in its order."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from .definition import as_results, random_tensor, torch_dtype
from .files import read_file


def reference_module(task: dict[str, Any]) -> dict[str, Any]:
    """Model, get_inputs, get_init_inputs of a workload.

    task: {"definition", "workload": JSON objects of the schema, "files": {path in the dataset: path here}}.
    Models are constructed with the definition less its reference, so that a candidate knows axes and outputs.
    """
    definition, workload, files = task["definition"], task["workload"], task["files"]
    run = _run_of(definition)
    kept: dict[str, torch.Tensor] = {}

    class Model:
        def __init__(self, definition: dict[str, Any]) -> None:
            self.definition = definition

        def __call__(self, *inputs: Any) -> Any:
            return as_results(self.definition, run(*inputs), inputs)

    def get_inputs() -> list[Any]:
        return [_input(definition, workload, name, files, kept) for name in definition["inputs"]]

    seen = {key: value for key, value in definition.items() if key in ("name", "op_type", "axes", "inputs", "outputs")}
    return {"Model": Model, "get_inputs": get_inputs, "get_init_inputs": lambda: [seen]}


def _run_of(definition: dict[str, Any]) -> Any:
    path = Path(os.environ.get("TMPDIR", ".")) / "definition_reference.py"
    path.write_text(definition["reference"])
    spec = importlib.util.spec_from_file_location("definition_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def _input(
    definition: dict[str, Any],
    workload: dict[str, Any],
    name: str,
    files: dict[str, str],
    kept: dict[str, torch.Tensor],
) -> Any:
    """One input: a recorded tensor, a given number, or a random one on torch's default device."""
    spec = definition["inputs"][name]
    given = workload["inputs"].get(name, {"type": "random"})
    if given["type"] == "scalar":
        return given["value"]
    constants = {axis: value["value"] for axis, value in definition["axes"].items() if value["type"] == "const"}
    sizes = constants | workload["axes"]
    shape = None if spec["shape"] is None else [sizes[axis] for axis in spec["shape"]]
    if given["type"] == "safetensors":
        if name not in kept:
            kept[name] = _recorded(files[given["path"]], given["tensor_key"])
        tensor = kept[name]
        if list(tensor.shape) != shape or tensor.dtype != torch_dtype(spec["dtype"]):
            raise ValueError(f"input {name}: recorded as {tensor.dtype} {list(tensor.shape)}, defined otherwise")
        return tensor.clone().to(torch.get_default_device())
    if shape is None:
        return random_tensor(spec["dtype"], []).item()
    return random_tensor(spec["dtype"], shape)


def _recorded(path: str, key: str) -> torch.Tensor:
    from safetensors.torch import load

    tensors = load(read_file(path))
    if key not in tensors:
        raise ValueError(f"{path} has no tensor {key!r}")
    return tensors[key]

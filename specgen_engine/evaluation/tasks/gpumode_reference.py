"""The judge's side of a GPU MODE task: its files become modules, its functions the names of a reference module."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

_SEED_BITS = 0x7FFFFFFF


def reference_module(task: dict[str, Any]) -> dict[str, Any]:
    """Model, get_inputs(case), get_init_inputs and, where the task has one, check_output.

    task: {"files": {name: text}, "cases": [arguments of generate_input]}. Raises what the task's files raise.
    """
    folder = Path(os.environ.get("TMPDIR", ".")) / "gpumode"
    folder.mkdir(exist_ok=True)
    for name, text in task["files"].items():
        (folder / name).write_text(text)
        sys.modules.pop(Path(name).stem, None)  # the judge's own name for its task is "task" too
    sys.path.insert(0, str(folder))
    reference = importlib.import_module("reference")
    for name in ("generate_input", "ref_kernel"):
        if not callable(getattr(reference, name, None)):
            raise ValueError(f"reference.py defines no {name}")
    cases = task["cases"]

    class Model:
        def __call__(self, data: Any) -> Any:
            return reference.ref_kernel(data)

    def get_inputs(case: int = 0) -> list[Any]:
        arguments = dict(cases[case])
        if "seed" in arguments:
            arguments["seed"] = torch.initial_seed() & _SEED_BITS  # the judge has just set a secret one
        return [reference.generate_input(**arguments)]

    def check_output(inputs: list[Any], result: Any, expected: Any) -> str:
        """By the task's own words: nothing when it is right."""
        answer = reference.check_implementation(inputs[0], result)
        good, reason = answer if isinstance(answer, tuple) else (not answer, answer)
        return "" if good else str(reason) or "check_implementation says no"

    names: dict[str, Any] = {"Model": Model, "get_inputs": get_inputs, "get_init_inputs": list}
    if callable(getattr(reference, "check_implementation", None)):
        names["check_output"] = check_output
    return names

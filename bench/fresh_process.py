"""One candidate judged the way KernelBench does it: a fresh process, everything in it; the baseline of throughput.

    python -m bench.fresh_process TASK.py CANDIDATE.py DEVICE

Five trials on fresh inputs against the reference in the same process (tolerance 1e-2), then 100 timed calls with CUDA
events (a rehearsal on a CPU: its wall clock); the reference is not timed (KernelBench reads its time from a file).
Prints one JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from types import ModuleType
from typing import Any

import torch

CORRECT_TRIALS, TIMED_CALLS, WARM_UP, TOLERANCE = 5, 100, 3, 1e-2


def load(path: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build(module: ModuleType, name: str, arguments: list[Any], device: str) -> Any:
    torch.manual_seed(42)
    return getattr(module, name)(*arguments).to(device)


def settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def judge(task: ModuleType, candidate: ModuleType, device: str) -> dict[str, Any]:
    arguments = task.get_init_inputs()
    reference, model = build(task, "Model", arguments, device), build(candidate, "ModelNew", arguments, device)
    inputs: list[Any] = []
    for trial in range(CORRECT_TRIALS):
        torch.manual_seed(trial)
        inputs = [one.to(device) if isinstance(one, torch.Tensor) else one for one in task.get_inputs()]
        expected, found = reference(*inputs), model(*inputs)
        settle(device)
        pairs = zip(*((one if isinstance(one, (tuple, list)) else (one,)) for one in (expected, found)), strict=True)
        if not all(torch.allclose(e.float(), f.float(), atol=TOLERANCE, rtol=TOLERANCE) for e, f in pairs):
            return {"status": "wrong"}
    return {"status": "correct", "ms": timed(lambda: model(*inputs), device)}


def timed(call: Any, device: str) -> float:
    for _ in range(WARM_UP):
        call()
    times = []
    if device == "cpu":
        for _ in range(TIMED_CALLS):
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    for _ in range(TIMED_CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> int:
    task, candidate, device = sys.argv[1:4]
    if device != "cpu":
        torch.cuda.set_device(device)
    try:
        with torch.no_grad():
            found = judge(load(task, "task"), load(candidate, "candidate"), device)
    except Exception as error:
        found = {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

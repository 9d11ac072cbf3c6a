"""A GPU's clocks and temperature, read by a process of its own.

A worker forks, and NVML must not have been used in a process that forks candidates (its children inherit a library
with closed descriptors; seen on an H100). So: python -m specgen_engine.evaluation.gpustate INDEX [--lock], which
answers every line on its standard input with one JSON line, and ends, unlocking, at the end of input.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .gpulock import name_of_gpu

PATIENCE_S = 0.05
START_S = 5.0
_THROTTLED = {0x4: "power cap", 0x8: "hardware", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}


class GpuState:
    """The supervisor's side. Every read gives an empty dict where NVML can't be used."""

    def __init__(self, device: str, lock_clocks: bool) -> None:
        index = device.partition(":")[2] or "0"
        command = [sys.executable, "-m", __name__, index, *(["--lock"] if lock_clocks else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._first = True

    def read(self) -> dict[str, Any]:
        """sm_mhz, memory_mhz, temperature_c, power_w, processes, throttled, locked; {} where nothing can be read."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
            patience = START_S if self._first else PATIENCE_S
            if not select.select([self.process.stdout], [], [], patience)[0]:
                return {}
            self._first = False
            return dict(json.loads(self.process.stdout.readline()))
        except (OSError, ValueError):
            return {}

    def close(self) -> None:
        """End of input: it unlocks the clocks and ends."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1.0)
        self.process.kill()


def conditions(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a verdict says of the GPU during its timing: the two readings, [before, after]."""
    found = {name: [before.get(name), after.get(name)] for name in ("sm_mhz", "memory_mhz", "temperature_c", "power_w")}
    said: dict[str, Any] = {name: values for name, values in found.items() if values != [None, None]}
    if after:
        said["throttled"] = sorted({*before.get("throttled", ()), *after.get("throttled", ())})
        said["clocks_locked"] = bool(after.get("locked"))
        said["gpu_processes"] = after.get("processes")
    return said


def _quiet(read: Callable[[], Any]) -> Any:
    import pynvml

    try:
        return read()
    except (pynvml.NVMLError, AttributeError):  # not offered by this GPU, or by this release of pynvml
        return None


def _handle(index: int) -> Any:
    import pynvml

    pynvml.nvmlInit()
    name = name_of_gpu(f"cuda:{index}")
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name.encode())


def serve(index: int, lock: bool) -> None:
    """Answer lines until the input ends."""
    import pynvml

    gpu = _handle(index)
    highest = _quiet(lambda: pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM))
    locked = lock and _quiet(lambda: pynvml.nvmlDeviceSetGpuLockedClocks(gpu, highest, highest) or True) is True
    try:
        for _ in sys.stdin:
            reasons = _quiet(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)) or 0
            power = _quiet(lambda: pynvml.nvmlDeviceGetPowerUsage(gpu))
            processes = _quiet(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(gpu))
            state = {
                "sm_mhz": _quiet(lambda: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM)),
                "memory_mhz": _quiet(lambda: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM)),
                "temperature_c": _quiet(lambda: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU)),
                "power_w": None if power is None else round(power / 1000),
                "processes": None if processes is None else len(processes),
                "throttled": [name for bit, name in _THROTTLED.items() if reasons & bit],
                "locked": locked,
                "at": time.time(),
            }
            print(json.dumps(state), flush=True)
    finally:
        if locked:
            _quiet(lambda: pynvml.nvmlDeviceResetGpuLockedClocks(gpu))


if __name__ == "__main__":
    serve(int(sys.argv[1]), "--lock" in sys.argv[2:])

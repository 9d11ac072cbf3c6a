"""Clocks and temperature by a process of its own, held against a stand-in for NVML."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from specgen_engine.evaluation.gpustate import GpuState, conditions

NVML = """
from pathlib import Path
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
class NVMLError(Exception): pass
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetMaxClockInfo(gpu, kind): return 1980
def _note(text): Path({log!r}).open("a").write(text)
def nvmlDeviceSetGpuLockedClocks(gpu, low, high):
    _note(f"lock {{low}} {{high}};")
    if {refuses}: raise NVMLError("no permission")
def nvmlDeviceResetGpuLockedClocks(gpu): _note("unlock")
def nvmlDeviceGetClockInfo(gpu, kind): return 1755 if kind == 1 else 2619
def nvmlDeviceGetTemperature(gpu, kind): return 41
def nvmlDeviceGetPowerUsage(gpu): raise NVMLError("not supported")
def nvmlDeviceGetComputeRunningProcesses(gpu): return [1, 2]
def nvmlDeviceGetCurrentClocksEventReasons(gpu): return 0x20 | 0x1
"""


@pytest.mark.parametrize("refuses", [False, True])
def test_states_and_locked_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    log = tmp_path / "log"
    (tmp_path / "pynvml.py").write_text(NVML.format(log=str(log), refuses=refuses))
    monkeypatch.syspath_prepend(str(tmp_path))
    state = GpuState("cuda:0", lock_clocks=True)
    before, after = state.read(), state.read()
    state.close()
    said = conditions(before, after)
    assert said == {
        "sm_mhz": [1755, 1755], "memory_mhz": [2619, 2619], "temperature_c": [41, 41],
        "throttled": ["heat (software)"], "clocks_locked": not refuses, "gpu_processes": 2,
    }  # fmt: skip
    deadline = time.monotonic() + 5
    while not refuses and "unlock" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.read_text() == ("lock 1980 1980;" if refuses else "lock 1980 1980;unlock")


def test_without_nvml_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pynvml.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(tmp_path))
    state = GpuState("cuda:0", lock_clocks=False)
    assert state.read() == {}
    assert conditions({}, state.read()) == {}
    state.close()

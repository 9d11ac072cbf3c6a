"""Every way in which a candidate can end, on one pool that must live on."""

from __future__ import annotations

import time

import pytest

from specgen_engine.evaluation.base import Stage, Status, Task

from .conftest import TASK, module

GOOD = "return torch.softmax(x, -1) * self.weight"


def test_correct_with_the_reference_s_weights(judge) -> None:
    verdict = judge(module(init="self.register_buffer('unused', torch.zeros(1), persistent=False)"))
    assert verdict.status is Status.CORRECT, verdict
    assert verdict.interval is not None
    assert verdict.interval[0] <= verdict.speedup <= verdict.interval[1]
    assert 0.3 < verdict.speedup < 3.0
    assert set(verdict.stages) == {Stage.QUEUED, Stage.COMPILE, Stage.CHECK, Stage.TIME}


def test_a_faster_kernel_is_faster(judge) -> None:
    slow = Task(
        TASK.source.replace(
            "return torch.softmax", "for _ in range(8): torch.softmax(x, -1)\n        return torch.softmax"
        )
    )
    assert judge(module(), slow).speedup > 3


FAULTS = {
    "syntax": ("class ModelNew(:\n  pass", Status.COMPILE_ERROR, "line 1"),
    "no ModelNew": ("import torch\nclass Other: pass", Status.COMPILE_ERROR, "no class ModelNew"),
    "import raises": (module(top="import nothing_of_this_name"), Status.COMPILE_ERROR, "nothing_of_this_name"),
    "binary": ("x = 1\0", Status.REJECTED, "binary"),
    "too long": ("#" * (1 << 20) + "\n" + module(), Status.REJECTED, "at most 1048576"),
    "init raises": (module(init="raise ValueError('bad width')"), Status.RUNTIME_ERROR, "bad width"),
    "forward raises": (module("raise KeyError('gone')"), Status.RUNTIME_ERROR, "gone"),
    "sys.exit": (module("raise SystemExit(0)"), Status.RUNTIME_ERROR, "SystemExit"),
    "wrong": (module("return torch.softmax(x, -1) * self.weight * 1.01"), Status.WRONG, "% of the elements"),
    "wrong shape": (module("return torch.softmax(x, -1)[:1]"), Status.WRONG, "shape"),
    "wrong dtype": (module("return (torch.softmax(x, -1) * self.weight).double()"), Status.WRONG, "dtype"),
    "nan": (module("return torch.softmax(x, -1) * self.weight + float('nan')"), Status.WRONG, "NaN"),
    "two outputs": (module("y = torch.softmax(x, -1) * self.weight; return y, y"), Status.WRONG, "returns"),
    "no tensor": (module("return None"), Status.WRONG, "returns"),
    "hang": (module("while True: pass"), Status.TIMEOUT, "3 s"),
    "hang, signals blocked": (
        module("while True: pass", top="import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))"),
        Status.TIMEOUT, "3 s",
    ),
    "segfault": (module("import ctypes; ctypes.string_at(0)"), Status.CRASH, "SIGSEGV"),
    "abort": (module("import os; os.abort()"), Status.CRASH, "SIGABRT"),
    "_exit(0)": (module("import os; os._exit(0)"), Status.CRASH, "exit code 0"),
    "too much memory": (module("return torch.ones(1 << 32)"), Status.RUNTIME_ERROR, "memory"),
    "endless output": (module("while True: print('x' * 1000)"), Status.RUNTIME_ERROR, "printed more"),
    "fork bomb": (module("import os\nwhile True: os.fork()"), None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_verdict(judge, name: str) -> None:
    source, status, words = FAULTS[name]
    verdict = judge(source)
    if status is None:  # which limit a fork bomb meets first depends on the machine
        assert verdict.status in (Status.RUNTIME_ERROR, Status.TIMEOUT, Status.CRASH)
        return
    assert verdict.status is status, verdict
    assert words in verdict.reason


def test_the_pool_lives_on_and_nothing_is_left(judge, pool_thread) -> None:
    import psutil

    assert judge(module()).status is Status.CORRECT
    snapshot = pool_thread.pool.snapshot()
    assert (snapshot["ready"], snapshot["restarts"], snapshot["busy"]) == (1, 0, 0)
    worker = psutil.Process(pool_thread.pool._slots[0].process.pid)
    deadline = time.monotonic() + 2
    while len(below := worker.children(recursive=True)) > 12 and time.monotonic() < deadline:
        time.sleep(0.01)  # what is killed when the verdict is told may still be on its way out
    assert len(below) <= 12, below  # three judges, the spare and what a sandbox puts around each


def test_time_off_the_cpu_clock_is_no_speed(judge) -> None:
    loops = "for _ in range(40): torch.softmax(x, -1)\n        return torch.softmax"
    slow = Task(TASK.source.replace("return torch.softmax", loops))
    verdict = judge(module("import time; time.sleep(0.03)\nreturn torch.softmax(x, -1) * self.weight"), slow)
    assert verdict.status is Status.REJECTED, verdict
    assert "clock stands still" in verdict.reason


def test_compile_error_digest(judge) -> None:
    top = """
from torch.utils.cpp_extension import load_inline
load_inline(name="broken", cpp_sources="int f() { return missing_name; }", functions=["f"], no_implicit_headers=True)
"""
    verdict = judge(module(top=top))
    assert verdict.status is Status.COMPILE_ERROR, verdict
    assert "missing_name" in verdict.reason
    assert "hint: include its header" in verdict.digest


TASK_FAULTS = {
    "import torch": "defines no Model",
    TASK.source.replace("def get_inputs", "def other"): "defines no get_inputs",
    TASK.source.replace("return [512]", "return [511]"): "511",
    "raise OSError('no such data')": "no such data",
    TASK.source.replace("return torch.softmax", "return torch.rand(1) + torch.softmax"): "differs between two calls",
    TASK.source.replace("return torch.softmax", "return float('nan') * torch.softmax"): "NaN",
    "import os\nos._exit(3)": "exit code 3",
}


@pytest.mark.parametrize("source", TASK_FAULTS)
def test_task_faults_are_one_line(pool_thread, source: str) -> None:
    fault = pool_thread.call(pool_thread.pool.check_task(Task(source)))
    assert fault is not None
    assert TASK_FAULTS[source] in fault
    assert "\n" not in fault


def test_a_good_task(pool_thread) -> None:
    assert pool_thread.call(pool_thread.pool.check_task(TASK)) is None


TOLD = "Error: accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run."
INVALIDATED = """
y = torch.softmax(x, -1) * self.weight
if self.last is not None:
    torch._C._set_storage_access_error_msg(self.last, {told!r})
self.last = y
return y
"""


def test_a_result_that_torch_itself_says_is_gone_is_no_fault(judge) -> None:
    """As torch.compile(mode="reduce-overhead") does; only a GPU has its graphs, so its way of saying so is used."""
    verdict = judge(module(INVALIDATED.format(told=TOLD), init="self.last = None"))
    assert verdict.status is Status.CORRECT, verdict
    other = judge(module(INVALIDATED.format(told="Error: another reason"), init="self.last = None"))
    assert other.status is Status.RUNTIME_ERROR, other
    assert "another reason" in other.reason

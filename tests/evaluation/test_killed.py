"""Who is killed from outside is judged again; a worker kills its own only, whatever numbers the kernel gives anew."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from specgen_engine.evaluation import children
from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict
from specgen_engine.evaluation.processes import Ended, Lost
from specgen_engine.evaluation.timed import Timed
from specgen_engine.evaluation.warm import SOURCE

from .conftest import TASK, Judge, PoolThread, module

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
SLOW_START = module(top="import time; time.sleep(0.6)")
SLOW_CALL = module(
    "if not self.calls: time.sleep(0.6)\nself.calls += 1\nreturn torch.softmax(x, -1) * self.weight",
    top="import time",
    init="self.calls = 0",
)


def processes_of(pool_thread: PoolThread, kind: str) -> list[psutil.Process]:
    """The forked one first, then those that its sandbox put below it; a spare, which has no text yet, is none."""
    worker = psutil.Process(pool_thread.pool.local.places[0].process.pid)
    found = []
    for process in worker.children(recursive=True):
        try:
            folder = Path(os.readlink(f"/proc/{process.pid}/cwd"))
        except OSError:
            continue
        if folder.name.startswith(f"{kind}-") and (kind == "judge" or (folder / SOURCE).exists()):
            found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """All of them; some end with those before."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


async def killed_once(pool_thread: PoolThread, source: str, at: Stage, kind: str, which: slice) -> Verdict:
    job = pool_thread.pool.submit(TASK, Candidate(source), search="killed")
    async for stage in job.events():
        if stage is at:
            break
    await asyncio.sleep(0.3)
    kill(processes_of(pool_thread, kind)[which])
    return await job.verdict()


@pytest.mark.parametrize("which", [slice(0, 1), slice(-1, None)], ids=["outermost", "innermost"])
@pytest.mark.parametrize(
    ("source", "at"), [(SLOW_START, Stage.COMPILE), (SLOW_CALL, Stage.CHECK)], ids=["import", "call"]
)
def test_an_honest_candidate_that_is_killed_is_judged_again(
    pool_thread: PoolThread, source: str, at: Stage, which: slice
) -> None:
    verdict = pool_thread.call(killed_once(pool_thread, f"# {which}\n{source}", at, "candidate", which))
    assert verdict.status is Status.CORRECT, verdict
    assert "killed by SIGKILL" in verdict.conditions["made_again"]


def test_the_verdict_says_that_the_judge_was_killed(pool_thread: PoolThread) -> None:
    verdict = pool_thread.call(killed_once(pool_thread, SLOW_CALL, Stage.CHECK, "judge", slice(None)))
    assert verdict.status is Status.CORRECT, verdict
    assert "reference failed: its process was killed by SIGKILL" in verdict.conditions["made_again"]


def test_one_that_kills_itself_has_no_third_try(judge: Judge) -> None:
    verdict = judge(module("os.kill(os.getpid(), 9)", top="import os"))
    assert verdict.status is Status.CRASH, verdict
    assert "killed by SIGKILL while running on fresh inputs" in verdict.reason
    assert verdict.conditions["made_again"] == verdict.reason
    assert "made_again" not in judge(module()).conditions


def test_a_task_is_not_blamed_for_a_killed_judge(pool_thread: PoolThread) -> None:
    task = Task(TASK.source.replace("def get_inputs():", "def get_inputs():\n    import time; time.sleep(0.6)"))

    async def run() -> str | None:
        asked = asyncio.ensure_future(pool_thread.pool.check_task(task))
        await asyncio.sleep(0.4)
        kill(processes_of(pool_thread, "judge"))
        return await asked

    assert pool_thread.call(run()) is None


@pytest.mark.parametrize("lost", [None, Lost(Status.CRASH, "its process killed by SIGKILL")])
def test_times_without_a_cpu_clock_are_forged_only_by_one_that_lives(lost: Lost | None) -> None:
    timed = SimpleNamespace(worker=SimpleNamespace(end_of=lambda child, doing: lost))
    child = SimpleNamespace(kind="candidate")
    with pytest.raises(Ended) as raised:
        Timed._times_in(timed, {"ns": [10_000_000]}, child, 1, -5_000_000)  # type: ignore[arg-type]
    assert raised.value.status is (Status.CRASH if lost else Status.REJECTED)
    assert Timed._times_in(timed, {"ns": [10_000_000]}, child, 1, 10_000_000) == [10_000_000]  # type: ignore[arg-type]


STRANGER = """
from specgen_engine.evaluation import children
children.become_subreaper()
children.silence({pid}, set())
print(children.kill_tree({pid}, set()))
"""


def test_a_process_of_somebody_else_s_is_not_killed_for_its_number() -> None:
    """A child that was collected frees its number, which the kernel may give to any process."""
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        script = STRANGER.format(pid=stranger.pid)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
        assert done.stdout.split() == ["[]"], done.stderr
        time.sleep(0.05)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


REUSED = """
import os, tempfile, time
from pathlib import Path
from specgen_engine.evaluation import children
from specgen_engine.evaluation.limits import EvaluationLimits
def fork(entry):
    return children.fork_child("candidate", entry, keep=(), scratch=Path(tempfile.mkdtemp()),
        limits=EvaluationLimits(), enter_sandbox=lambda: None, environment={}, cap_memory=False)
for number in range(200):
    orphan = os.fork()
    if orphan == 0:
        os.kill(os.getpid(), 9)
    while children._state_of(orphan):
        children.reap()
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(orphan - 1))
    child = fork(lambda channel: time.sleep(30))
    if child.pid == orphan:
        break
    children.kill_tree(child.pid, set())
print(child.pid == orphan, children.exit_code(child.pid))
spare = {child.pid}
children.silence(orphan, spare)  # one that ended, whose number a newer child of this process has
time.sleep(0.05)
print(children.exit_code(child.pid))
children.kill_tree(child.pid, set())
"""


@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason=f"{LAST_PID} can't be written: no number is given again")
def test_a_child_with_an_orphan_s_number_is_alive() -> None:
    """The orphan's end, which nobody asked about, is not the child's."""
    done = subprocess.run([sys.executable, "-c", REUSED], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["True None", "None"], done.stdout + done.stderr


@pytest.mark.parametrize("depth", [0, 1], ids=["itself", "below its sandbox"])
def test_a_kill_is_told_though_the_driver_takes_its_time(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    """A process's channel closes first, its CUDA context last: its exit code comes late, and is waited for."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    leaving_until = time.monotonic() + 0.6
    below = os.getpid() if depth else child.pid  # which of them the kernel takes down
    monkeypatch.setattr(children, "descendants", lambda *_: {os.getpid()} if depth else set())
    monkeypatch.setattr(children, "_state_of", lambda pid: (1, pid == below and time.monotonic() < leaving_until))
    killer = threading.Timer(0.5, child.kill)
    killer.start()
    assert children.exit_code_of_closed(child.pid, 5.0) == -signal.SIGKILL
    killer.join()


def test_who_closes_its_channel_and_lives_on_is_not_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    began = time.monotonic()
    assert children.exit_code_of_closed(child.pid, 5.0) is None
    assert time.monotonic() - began < 2
    child.kill()
    assert children.exit_code(child.pid, wait_s=5) == -signal.SIGKILL

"""A GPU's memory is promised to one evaluation at a time, and asked back from workers where it is short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from specgen_engine.evaluation import evaluate as evaluations
from specgen_engine.evaluation.base import Status
from specgen_engine.evaluation.gpuroom import Promise, is_refused_memory, last_shortage, note_shortage, promised
from specgen_engine.evaluation.processes import Ended, Lost, Processes
from specgen_engine.evaluation.worker import Worker

from .conftest import TASK
from .test_overlap import BUILT, DEVICE, IMPORTED, LOADED, LOOK, imported, own_folder  # noqa: F401

SAID = [LOADED, BUILT, IMPORTED]
NO_MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB."


def after_import(log: list[str]) -> list[str]:
    return log[log.index("candidate: imported") + 1 :]


def test_promises_count_until_they_are_closed_or_their_owner_dies() -> None:
    first, second = Promise(DEVICE, 30), Promise(DEVICE, 12)
    assert (promised(DEVICE), promised("cuda:78")) == (42, 0)
    first.close()
    assert promised(DEVICE) == 12
    program = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        f"from specgen_engine.evaluation.gpuroom import Promise; Promise('{DEVICE}', 100)\n"
        "print(flush=True); time.sleep(60)"
    )
    folder = second.path.parent
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert promised(DEVICE) == 112
        other.send_signal(signal.SIGKILL)
    assert promised(DEVICE) == 12
    second.close()
    assert [path.name for path in folder.iterdir() if "promise" in path.name] == []


def test_what_others_were_promised_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "alone" not in imported(SAID, "load_inline", monkeypatch, free=[9])
    other = Promise(DEVICE, 8)
    log = imported(SAID, "load_inline", monkeypatch, free=[9, 9])
    other.close()
    assert after_import(log)[:6] == ["turn", *LOOK, "no room for judges", "alone", "judge room"]


def test_who_lacks_memory_alone_asks_for_it_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = last_shortage(DEVICE)
    log = imported(SAID, "load_inline", monkeypatch, free=[1, 0, 0, 0, 1])
    assert after_import(log)[:4] == ["turn", *LOOK, "no room for judges"]
    assert log.count("judge room") == 5, "until there is enough"
    assert last_shortage(DEVICE) > before


def test_where_memory_stays_short_it_goes_on_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specgen_engine.evaluation.checked.GIVE_BACK_S", 0.1)
    log = imported(SAID, "load_inline", monkeypatch, free=[1, *[0] * 100_000])
    assert log[-3] == "1 promised"


def test_what_asking_did_not_bring_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before = last_shortage(DEVICE)
    log = imported(SAID, "load_inline", monkeypatch, free=[1, 0, 0], too_much=1)
    assert (log.count("judge room"), last_shortage(DEVICE)) == (2, before)


def test_one_that_met_a_full_gpu_has_it_alone_from_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    before = last_shortage(DEVICE)
    log = imported(SAID, "load_inline", monkeypatch, crowded=True)
    assert log.index("alone") < log.index("judge place")
    assert after_import(log)[:2] == ["turn", "alone"]
    assert last_shortage(DEVICE) > before


class Idle(Worker):
    """A worker on a GPU without children."""

    def __init__(self) -> None:
        self.device, self.on_gpu, self.job, self.short_at = DEVICE, True, "", last_shortage(DEVICE)
        self.judge, self.parked = "judge", {"a": ("a's", True), "b": ("b's", True)}  # type: ignore[assignment]
        self.ended: list[str] = []

    def _silence(self, child: Any, patience_s: float = 0.0) -> None:
        self.ended.append(child)


@pytest.mark.parametrize(("job", "ended"), [("", ["a's", "b's", "judge"]), ("j1", ["a's", "b's"])])
def test_a_worker_ends_what_it_keeps_once_for_each_shortage(
    monkeypatch: pytest.MonkeyPatch, job: str, ended: list[str]
) -> None:
    monkeypatch.setattr(Processes, "pump", lambda self, seconds: None)
    worker = Idle()
    worker.job = job
    worker.pump(0.0)
    assert worker.ended == []
    note_shortage(DEVICE)
    worker.pump(0.0)
    worker.pump(0.0)
    assert worker.ended == ended


@pytest.mark.parametrize(
    ("reason", "refused"),
    [
        (NO_MEMORY, True),
        ("GpuMemoryError: cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY (2)", True),
        ("RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("out of memory: it holds more than 4096 MiB", False),
        ("ValueError: shapes differ", False),
        ("", False),
    ],
)
def test_what_says_that_a_gpu_had_no_memory(reason: str, refused: bool) -> None:
    assert is_refused_memory(reason) is refused


class Scripted:
    """In Evaluation's place: its tries end as a test says."""

    tries: ClassVar[list[Ended]] = []
    crowded_at: ClassVar[list[bool]] = []
    crowded = False

    def __init__(self, worker: Any, request: dict[str, Any], held: ExitStack) -> None:
        self.candidate, self.job = SimpleNamespace(hash="c", source=""), request["job"]
        self.shown: dict[str, Any] = {}
        self.stages, self.own_s, self.waited_s, self.conditions = {}, 0.0, 0.0, dict[str, Any]()

    def run(self) -> None:
        self.crowded_at.append(self.crowded)
        raise self.tries.pop(0)

    def note_hang(self, ended: Ended) -> None:
        pass

    def step(self, name: str) -> ExitStack:
        return ExitStack()

    def overhead(self) -> dict[str, float]:
        return {}


def played(
    monkeypatch: pytest.MonkeyPatch, tries: list[Ended], on_gpu: bool = True
) -> tuple[list[bool], dict[str, Any]]:
    """Had each try the GPU alone? And the verdict that was told."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(Scripted, "tries", tries)
    monkeypatch.setattr(Scripted, "crowded_at", [])
    monkeypatch.setattr(evaluations, "Evaluation", Scripted)
    worker = SimpleNamespace(device=DEVICE, level="none", on_gpu=on_gpu, link=SimpleNamespace(send=told.append))
    worker.silence_candidate = lambda: None
    evaluations.evaluate(worker, {"job": "j", "task": {"source": TASK.source, "name": "t"}})  # type: ignore[arg-type]
    assert len(told) == 1
    return Scripted.crowded_at, told[0]["verdict"]


def test_a_full_gpu_is_no_verdict_before_the_candidate_had_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Ended(Status.WRONG, "values differ")
    crowded, verdict = played(monkeypatch, [Ended(Status.RUNTIME_ERROR, NO_MEMORY), wrong])
    assert crowded == [False, True]
    assert (verdict["status"], verdict["conditions"]["made_again"]) == (Status.WRONG, NO_MEMORY)


def test_one_that_is_too_large_for_the_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    crowded, verdict = played(monkeypatch, [Ended(Status.RUNTIME_ERROR, NO_MEMORY) for _ in range(2)])
    assert (crowded, verdict["status"], verdict["reason"]) == ([False, True], Status.RUNTIME_ERROR, NO_MEMORY)


def test_others_have_one_try_or_their_second_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert played(monkeypatch, [Ended(Status.RUNTIME_ERROR, NO_MEMORY)], on_gpu=False)[0] == [False]
    killed = Lost(Status.CRASH, "its process killed by SIGKILL")
    assert played(monkeypatch, [killed, Ended(Status.WRONG, "values differ")])[0] == [False, False]


@pytest.mark.parametrize(
    ("answers", "alone", "told"),
    [
        ([Ended(Status.RUNTIME_ERROR, f"the task's reference failed: {NO_MEMORY}"), None], [False, True], None),
        ([NO_MEMORY, NO_MEMORY], [False, True], NO_MEMORY),
        ([Lost(Status.RUNTIME_ERROR, "killed"), None], [False, False], None),
        (["its results contain NaN"], [False], "its results contain NaN"),
    ],
)
def test_a_task_is_refused_for_memory_only_after_it_had_the_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], alone: list[bool], told: str | None
) -> None:
    asked: list[bool] = []

    def probe(worker: Any, request: dict[str, Any], apart: bool) -> str | None:
        asked.append(apart)
        answer = answers.pop(0)
        if isinstance(answer, Ended):
            raise answer
        return answer

    monkeypatch.setattr(evaluations, "_probe", probe)
    found = evaluations.check_task(SimpleNamespace(on_gpu=True), {"job": "j"})  # type: ignore[arg-type]
    assert (asked, found) == (alone, {"job": "j", "task": told})


def test_only_this_users_files_count(tmp_path: Path) -> None:
    (tmp_path / f"specgen-gpu-77-{os.getuid()}.promise-left").write_text("99")
    assert promised(DEVICE) == 0
    assert not list(tmp_path.glob("*promise-left")), "nobody holds it: it was left by one who died"

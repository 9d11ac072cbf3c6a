"""Two passes over the same answers: in which order, with how many workers, and when they end."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import evaluation
from bench.evaluation import Answer, Record, at_most, judge_twice
from specgen_engine.evaluation.base import Candidate, Status, Task, Verdict


class FakePool:
    """Judges at once, but for those that it is to sleep over; notes when each is submitted and told."""

    def __init__(self, log: list[str], sleeps: dict[str, float]) -> None:
        self.log, self.sleeps = log, sleeps

    async def start(self) -> None:
        self.cancelled = asyncio.Event()
        self.log.append("start")

    def submit(self, task: Task, candidate: Candidate, search: str) -> Any:
        name = candidate.source
        self.log.append(f"+{name}")

        async def verdict() -> Verdict:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.cancelled.wait(), self.sleeps.get(name, 0.01))
            self.log.append(f"-{name}")
            if self.cancelled.is_set():
                return Verdict(name, Status.CANCELLED)
            return Verdict(name, Status.CORRECT, speedup=2.0, interval=(1.9, 2.1), candidate_ms=1.0, reference_ms=2.0)

        return SimpleNamespace(verdict=verdict)

    def cancel_search(self, search: str) -> int:
        self.cancelled.set()
        return 0

    def snapshot(self) -> dict[str, Any]:
        return {"sandbox": "none", "restarts": 0}

    async def close(self) -> None:
        self.log.append("close")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    log: list[str] = []
    workers: list[int] = []

    def judge(seconds: float = 30.0, cores: int = 16, **sleeps: float) -> tuple[list[str], list[int], Record]:
        monkeypatch.setattr(evaluation, "cores", lambda: cores)

        def new_pool(args: Namespace, count: int) -> FakePool:
            workers.append(count)
            return FakePool(log, sleeps)

        monkeypatch.setattr(evaluation, "new_pool", new_pool)
        kinds = {"t1": "triton", "c1": "cuda", "t2": "triton", "c2": "cuda"}
        answers = [Answer(f"{name}.md", Task("", "task"), Candidate(name), kind) for name, kind in kinds.items()]
        args = Namespace(json=tmp_path / "f.json", resume=None, label="x", device="cpu", twice=6, light_workers=4)
        args.ends = time.monotonic() + seconds
        record = Record(args)
        asyncio.run(judge_twice(answers, {}, args, record))
        return log, workers, record

    return judge


def test_those_in_cuda_come_when_all_others_are_told_in_both_passes(run: Any) -> None:
    log, workers, record = run(t1=0.05)
    one = ["start", "+t1", "+t2", "-t2", "-t1", "+c1", "+c2", "-c1", "-c2", "close"]
    assert log == one * 2
    assert workers == [4, 4]
    assert [row["pass"] for row in record.rows] == ["twice-1"] * 4 + ["twice-2"] * 4


def test_none_is_begun_when_the_time_is_over(run: Any) -> None:
    log, _, record = run(seconds=0.5, t1=5.0)
    assert "+c1" not in log[: log.index("close")]
    assert {row["candidate"] for row in record.rows} == {"t2.md"}


@pytest.mark.parametrize(("asked", "cores", "found"), [(4, 16, 4), (12, 16, 4), (4, 8, 2), (4, 2, 1), (12, 64, 12)])
def test_workers_are_no_more_than_the_cores_carry(run: Any, asked: int, cores: int, found: int) -> None:
    assert at_most(asked, cores) == found
    assert run(cores=8)[1] == [2, 2]

"""A candidate that does not end: it is cancelled at once at any stage, and never run a second time."""

from __future__ import annotations

import asyncio
import time

import pytest

from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict

from .conftest import TASK, PoolThread, module

FOREVER = "import time\ntime.sleep(3600)"
SLOW_TASK = Task(
    TASK.source.replace("def forward(self, x):", "def forward(self, x):\n        import time; time.sleep(9)")
)
STAGES = {
    "import": (TASK, module(top=FOREVER), Stage.COMPILE),
    "construction": (TASK, module(init=FOREVER), Stage.COMPILE),
    "reference": (SLOW_TASK, module(), Stage.CHECK),
    "check": (TASK, module(FOREVER), Stage.CHECK),
    "timing": (
        TASK,
        module(
            "self.calls += 1\nif self.calls > 6: time.sleep(3600)\nreturn torch.softmax(x, -1) * self.weight",
            top="import time",
            init="self.calls = 0",
        ),
        Stage.TIME,
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_cancelled_within_200_ms(pool_thread: PoolThread, name: str) -> None:
    task, source, stage = STAGES[name]

    async def run() -> tuple[Verdict, float]:
        job = pool_thread.pool.submit(task, Candidate(source), search="cancel")
        async for reached in job.events():
            if reached is stage:
                break
        await asyncio.sleep(0.3)
        start = time.monotonic()
        job.cancel()
        return await job.verdict(), time.monotonic() - start

    verdict, seconds = pool_thread.call(run())
    assert verdict.status is Status.CANCELLED, verdict
    assert seconds < 0.2


def test_cancelled_while_the_last_one_is_cleared_away(pool_thread: PoolThread) -> None:
    async def run() -> tuple[list[Verdict], float]:
        jobs = [pool_thread.pool.submit(TASK, Candidate(module()), search="cancel") for _ in range(3)]
        await jobs[0].verdict()
        start = time.monotonic()
        for job in jobs[1:]:
            job.cancel()
        return [await job.verdict() for job in jobs], time.monotonic() - start

    verdicts, seconds = pool_thread.call(run())
    assert [verdict.status for verdict in verdicts] == [Status.CORRECT, Status.CANCELLED, Status.CANCELLED]
    assert seconds < 0.2


def test_a_hang_is_remembered_for_its_task_only(pool_thread: PoolThread, judge) -> None:
    source = module(
        "if x.shape[0] == 256:\n    while True: pass\nreturn torch.softmax(x, -1) * self.weight", top="# hangs"
    )
    first = judge(source)
    assert first.status is Status.TIMEOUT, first
    start = time.monotonic()
    again = judge(source)
    assert again.status is Status.TIMEOUT
    assert "not run again" in again.reason
    assert time.monotonic() - start < 0.5
    assert judge(source, Task(TASK.source.replace("randn(256, 512)", "randn(64, 512)"))).status is Status.CORRECT

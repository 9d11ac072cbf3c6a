"""The local pool: cancelling, deadlines, lost workers, both event loops."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import uvloop

from specgen_engine.evaluation.base import Candidate, Stage, Status
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool
from tests.evaluation.conftest import LIMITS, TASK, module

SLEEPS = module("import time; time.sleep(3600)")


@pytest.fixture(params=[pytest.param("asyncio", marks=pytest.mark.slow), "uvloop"])
def with_pool(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[Callable[[LocalPool], Awaitable[None]]], None]:
    def run(use: Callable[[LocalPool], Awaitable[None]]) -> None:
        async def session() -> None:
            pool = LocalPool(workers=1, limits=LIMITS, cache=tmp_path)
            await pool.start()
            assert pool._slots[0].process is not None
            worker = pool._slots[0].process.pid
            try:
                await use(pool)
            finally:
                await pool.close()
            assert not psutil.pid_exists(worker)

        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(session())

    return run


def test_life_of_a_pool(with_pool) -> None:
    async def use(pool: LocalPool) -> None:
        assert await pool.check_task(TASK) is None
        await _cancelling(pool)
        await _deadlines(pool)
        await _priorities(pool)
        await _lost_worker(pool)
        running = pool.submit(TASK, Candidate(SLEEPS), search="s")
        await _reached(running, Stage.CHECK)
        await pool.close()
        assert (await running.verdict()).status is Status.CANCELLED
        with pytest.raises(ValueError, match="closed"):
            pool.submit(TASK, Candidate(SLEEPS), search="s")

    with_pool(use)


async def _cancelling(pool: LocalPool) -> None:
    running = pool.submit(TASK, Candidate(SLEEPS), search="one")
    waiting = pool.submit(TASK, Candidate(SLEEPS), search="one")
    other = pool.submit(TASK, Candidate(module()), search="two")
    await _reached(running, Stage.CHECK)
    start = time.monotonic()
    assert pool.cancel_search("one") == 2
    assert (await waiting.verdict()).status is Status.CANCELLED
    assert (await running.verdict()).status is Status.CANCELLED
    assert time.monotonic() - start < 0.2 * _patience()
    assert (await other.verdict()).status is Status.CORRECT
    assert [stage async for stage in other.events()] == [Stage.QUEUED, Stage.COMPILE, Stage.CHECK, Stage.TIME]


async def _deadlines(pool: LocalPool) -> None:
    with pytest.raises(ValueError, match="deadline"):
        pool.submit(TASK, Candidate(SLEEPS), search="s", deadline=time.monotonic() - 1)
    running = pool.submit(TASK, Candidate(SLEEPS), search="s")
    late = pool.submit(TASK, Candidate(SLEEPS), search="s", deadline=time.monotonic() + 0.05)
    assert (await late.verdict()).status is Status.TIMEOUT
    running.cancel()
    assert (await running.verdict()).status is Status.CANCELLED


async def _priorities(pool: LocalPool) -> None:
    first = pool.submit(TASK, Candidate(SLEEPS), search="s")
    ended: list[str] = []
    jobs = [pool.submit(TASK, Candidate("x = 1"), search="s", priority=priority) for priority in (0.0, 5.0, 1.0)]
    for job, name in zip(jobs, "abc", strict=True):
        job.result.add_done_callback(lambda _, name=name: ended.append(name))
    first.cancel()
    await asyncio.gather(*(job.verdict() for job in jobs))
    await asyncio.sleep(0)
    assert ended == ["b", "c", "a"]


async def _lost_worker(pool: LocalPool) -> None:
    """A worker killed under a job: the job is run again by the next one; nothing of the first survives."""
    job = pool.submit(
        TASK, Candidate(module("import time; time.sleep(0.4)\nreturn torch.softmax(x, -1) * self.weight")), search="s"
    )
    await _reached(job, Stage.CHECK)
    process = pool._slots[0].process
    assert process is not None
    below = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert (await job.verdict()).status is Status.REJECTED  # it sleeps; but it was judged
    assert job.tries == 1
    assert not [child for child in below if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


async def _reached(job, stage: Stage) -> None:
    async for reached in job.events():
        if reached is stage:
            return


def _patience() -> float:
    """Bounds hold on an idle machine; on a loaded one they stretch with the load."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        LocalPool(workers=0)
    with pytest.raises(ValueError, match="device='tpu'"):
        LocalPool(device="tpu")
    with pytest.raises(ValueError, match="check_seeds=0"):
        EvaluationLimits(check_seeds=0)
    with pytest.raises(ValueError, match="sandbox='maybe'"):
        EvaluationLimits(sandbox="maybe")


def test_a_gpu_that_is_not_there_is_refused_before_a_worker_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert [place.device for place in LocalPool(device="cuda:0,cuda:1", workers=2).local.places] == [
        "cuda:0",
        "cuda:1",
    ] * 2
    with pytest.raises(ValueError, match=r"device='cuda:2': there are 2 GPUs here; use a lower number"):
        LocalPool(device="cuda:1,cuda:2")


def test_a_worker_that_cannot_start_is_one_error(tmp_path: Path) -> None:
    async def session() -> None:
        pool = LocalPool(workers=1, device="cuda:0", limits=LIMITS, cache=tmp_path)
        pool._slots[0]._spawn = lambda theirs: _true(pool)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no evaluation worker starts"):
            await pool.start()

    asyncio.run(session())


def _true(pool: LocalPool):
    import subprocess

    pool._slots[0].scratch = Path("/nonexistent")
    return subprocess.Popen(["true"])

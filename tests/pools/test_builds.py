"""Long C++ builds in a live pool: what is quick does not wait for them, and a cancelled one frees its place at once.

The compiler is a stand-in: a candidate whose text names load_inline, and whose import lasts as long as a build.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import psutil
import pytest

from specgen_engine.evaluation.base import Candidate, Stage, Status
from specgen_engine.pools.builds import build_kind
from specgen_engine.pools.local import LocalPool
from tests.pools.burst import LIMITS, TASK

BUILD = """
import os, pathlib, time
from torch.utils.cpp_extension import load_inline  # {number}
import torch
LIBRARY = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "library"
if not LIBRARY.exists():
    LIBRARY.with_name("begun").touch()
    time.sleep({seconds})
    LIBRARY.touch()
class ModelNew(torch.nn.Module):
    def forward(self, x):
        return torch.add(x * 2.0, {bias})
"""
BUILD_S = 8.0
QUICK = (
    "import torch\nclass ModelNew(torch.nn.Module):\n    def forward(self, x):\n        return x * 2.0 + 1.0  # {}\n"
)


def build(number: int, seconds: float, bias: float = 1.0) -> Candidate:
    return Candidate(BUILD.format(number=number, seconds=seconds, bias=bias))


def with_pool(use: Callable[[LocalPool], Awaitable[None]], folder: Path, workers: int, build_slots: int) -> None:
    async def session() -> None:
        pool = LocalPool(workers=workers, limits=LIMITS, cache=folder, build_slots=build_slots)
        await pool.start()
        try:
            await when(lambda: pool.snapshot()["ready"] == workers)
            assert await pool.check_task(TASK) is None
            await use(pool)
        finally:
            await pool.close()

    asyncio.run(session())


async def reached(job, stage: Stage) -> None:
    async for one in job.events():
        if one is stage:
            return


def at_work(folder: Path) -> int:
    """Builds that have begun in this cache."""
    return len(list(folder.glob("*/torch/begun")))


async def when(true: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not true():  # noqa: ASYNC110  (nothing tells it)
            await asyncio.sleep(0.05)


async def seconds_of_a_quick_one(pool: LocalPool, number: int) -> float:
    start = time.monotonic()
    verdict = await pool.submit(TASK, Candidate(QUICK.format(number)), search="quick").verdict()
    assert verdict.status is Status.CORRECT
    return time.monotonic() - start


@pytest.mark.parametrize("build_slots", [2, 0], ids=["builders", "workers build"])
def test_a_quick_candidate_does_not_wait_for_builds_that_could_hold_every_worker(
    build_slots: int, tmp_path: Path
) -> None:
    async def use(pool: LocalPool) -> None:
        alone = min([await seconds_of_a_quick_one(pool, number) for number in range(3)])
        long = [pool.submit(TASK, build(number, BUILD_S), search=f"s{number}") for number in range(4)]
        await when(lambda: at_work(tmp_path) == (build_slots or 1))
        beside = [await seconds_of_a_quick_one(pool, number) for number in range(3, 6)]
        print(f"quick candidate alone {alone:.2f} s, beside four builds of {BUILD_S} s {beside} s")
        assert max(beside) < alone + 1.0
        for job in long:
            job.cancel()

    with_pool(use, tmp_path, workers=2, build_slots=build_slots)


def test_a_built_candidate_is_judged_and_its_build_counts_as_compile(tmp_path: Path) -> None:
    async def use(pool: LocalPool) -> None:
        job = pool.submit(TASK, build(1, 2.0), search="s")
        verdict = await job.verdict()
        assert (verdict.status, verdict.reason) == (Status.CORRECT, "")
        assert 2.0 <= verdict.stages["compile"] < 30.0
        assert verdict.stages["queued"] < verdict.stages["compile"]
        assert verdict.own_s >= 2.0
        assert [stage async for stage in job.events()] == [Stage.QUEUED, Stage.COMPILE, Stage.CHECK, Stage.TIME]
        again = await pool.submit(TASK, build(1, 2.0), search="s").verdict()
        assert again.stages["compile"] < 2.0
        wrong = await pool.submit(TASK, build(2, 0.1, bias=2.0), search="s").verdict()
        assert wrong.status is Status.WRONG
        broken = await pool.submit(TASK, Candidate(BUILD.replace("LIBRARY.touch()", "nothing()").format(
            number=3, seconds=0.1, bias=1.0)), search="s").verdict()  # fmt: skip
        assert broken.status is Status.COMPILE_ERROR
        assert "nothing" in broken.reason
        assert broken.stages["compile"] >= 0.1
        assert pool.snapshot()["finished"] == {"correct": 2, "wrong": 1, "compile_error": 1}

    with_pool(use, tmp_path, workers=1, build_slots=1)


def test_a_cancelled_build_frees_its_place_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    async def use(pool: LocalPool) -> None:
        first = pool.submit(TASK, build(1, 3600.0), search="one")
        second = pool.submit(TASK, build(2, 0.1), search="two")
        await reached(first, Stage.COMPILE)
        await when(lambda: at_work(tmp_path) == 1)
        assert second.seen == [Stage.QUEUED]
        builder = psutil.Process(pool.local.builder.process.pid)
        running = builder.children(recursive=True)
        assert running
        start = time.monotonic()
        assert pool.cancel_search("one") == 1
        assert (await first.verdict()).status is Status.CANCELLED
        await reached(second, Stage.COMPILE)
        freed_s = time.monotonic() - start
        print(f"place free {freed_s:.3f} s after the cancel")
        assert freed_s < 0.5
        await when(lambda: not [one for one in running if one.is_running()])
        assert (await second.verdict()).status is Status.CORRECT

    with_pool(use, tmp_path, workers=1, build_slots=1)


DIES_WHILE_IT_BUILDS = """
import os, pathlib
from torch.utils.cpp_extension import load_inline
import torch
LOCK = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "late" / "lock"
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        if LOCK.exists():
            raise RuntimeError("locked for ever")
        LOCK.parent.mkdir(exist_ok=True)
        LOCK.touch()
        os._exit(3)
"""


def test_a_build_that_was_killed_in_a_constructor_locks_nobody_out(tmp_path: Path) -> None:
    async def use(pool: LocalPool) -> None:
        for _ in range(2):
            verdict = await pool.submit(TASK, Candidate(DIES_WHILE_IT_BUILDS), search="s").verdict()
            assert "locked" not in verdict.reason
            assert verdict.status in (Status.CRASH, Status.RUNTIME_ERROR)
            await when(lambda: not [one for one in tmp_path.glob("*.lock") if is_held(one)])

    with_pool(use, tmp_path, workers=1, build_slots=1)


def is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True


def test_a_killed_builder_loses_no_job(tmp_path: Path) -> None:
    async def use(pool: LocalPool) -> None:
        lost = pool.submit(TASK, build(1, 1.0), search="s")
        await when(lambda: at_work(tmp_path) == 1)
        os.kill(pool.local.builder.process.pid, signal.SIGKILL)
        assert (await lost.verdict()).status is Status.CORRECT
        assert (await pool.submit(TASK, build(2, 0.1), search="s").verdict()).status is Status.CORRECT
        assert pool.local.builder.failures == 0

    with_pool(use, tmp_path, workers=1, build_slots=1)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (QUICK, ""),
        ("import triton\nclass ModelNew: pass\n", ""),
        ("# load_inline would be slower\nimport triton\nclass ModelNew: pass\n", ""),
        (BUILD.format(number=0, seconds=0, bias=0), "cpp_inline"),
        (BUILD.format(number=0, seconds=0, bias=0) + 'K = "__global__ void k()"\n', "cuda_inline"),
        ('// specgen: entry k(x)\nextern "C" int k() { return 0; }\n', "cuda"),
        ('{"spec": {"language": "cuda"}, "sources": []}', "cuda"),
        ('{"spec": {"language": "triton"}, "sources": []}', ""),
    ],
)
def test_which_texts_have_a_build(source: str, kind: str) -> None:
    assert build_kind(Candidate(source)) == kind

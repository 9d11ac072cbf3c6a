"""The same stages on a GPU."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict
from specgen_engine.evaluation.gpuroom import last_shortage
from specgen_engine.pools.local import LocalPool

from .conftest import LIMITS, TASK, module

TRITON = """
import triton, triton.language as tl
@triton.jit
def _softmax(x, w, y, n: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, n)
    v = tl.load(x + row * n + at)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * n + at, e / tl.sum(e, 0) * tl.load(w + at))
"""
LAUNCH = "y = torch.empty_like(x)\n_softmax[(x.shape[0],)](x, self.weight, y, x.shape[1])\nreturn y"
LARGE = Task(TASK.source.replace("randn(256, 512)", "randn(65536, 512)"), "large softmax")
"""128 MiB in, as much out: some 0.06 ms of an H200."""
HANG = """
import triton, triton.language as tl
@triton.jit
def _hang(y):
    while tl.load(y, volatile=True) == 0:
        pass
"""


@pytest.mark.gpu(count=1)
def test_verdicts_on_a_gpu(tmp_path: Path) -> None:
    async def session() -> list[Verdict]:
        pool = LocalPool(workers=1, device="cuda:0", limits=replace(LIMITS, check_s=20), cache=tmp_path)
        await pool.start()
        try:
            assert await pool.check_task(TASK) is None
            sources = [
                module(LAUNCH, top=TRITON),
                module(LAUNCH.replace("self.weight", "x"), top=TRITON),
                module("y = torch.zeros(1, device=x.device)\n_hang[(1,)](y)\nreturn x", top=HANG),
                module(),
            ]
            return [await pool.submit(TASK, Candidate(source), search="test").verdict() for source in sources]
        finally:
            await pool.close()

    good, wrong, hang, again = asyncio.run(session())
    assert good.status is Status.CORRECT, good
    assert wrong.status is Status.WRONG, wrong
    assert hang.status is Status.TIMEOUT, hang
    assert again.status is Status.CORRECT, again


AFTER_SIX = "self.calls += 1\nif self.calls > 6:\n    _hang[(1,)](torch.zeros(1, device=x.device))\n"
CANCELLED = {
    Stage.COMPILE: module(top="import time\ntime.sleep(3600)"),
    Stage.CHECK: module("y = torch.zeros(1, device=x.device)\n_hang[(1,)](y)\nreturn x", top=HANG),
    Stage.TIME: module(AFTER_SIX + "return torch.softmax(x, -1) * self.weight", top=HANG, init="self.calls = 0"),
}


async def _cancel_at(pool: LocalPool, stage: Stage) -> tuple[Verdict, float]:
    """The verdict, and the seconds from the call of cancel() to it."""
    job = pool.submit(TASK, Candidate(CANCELLED[stage]), search="cancel")
    async for reached in job.events():
        if reached is stage:
            break
    await asyncio.sleep(1.0 if stage is Stage.CHECK else 0.3)  # a kernel is compiled first
    start = time.monotonic()
    job.cancel()
    return await job.verdict(), time.monotonic() - start


@pytest.mark.gpu(count=1)
def test_cancelled_within_200_ms_at_any_stage_and_the_gpu_goes_on(tmp_path: Path) -> None:
    """Hung kernels among them: the next candidate, which needs the GPU alone, has its verdict soon."""

    async def session() -> list[tuple[Stage, Verdict, float, Verdict, float]]:
        pool = LocalPool(workers=1, device="cuda:0", limits=replace(LIMITS, check_s=20), cache=tmp_path)
        await pool.start()
        try:
            first = await pool.submit(TASK, Candidate(module()), search="test").verdict()
            assert first.status is Status.CORRECT, first
            found = []
            for stage in CANCELLED:
                cancelled, seconds = await _cancel_at(pool, stage)
                start = time.monotonic()
                after = await pool.submit(TASK, Candidate(module(top=f"# {stage}")), search="test").verdict()
                found.append((stage, cancelled, seconds, after, time.monotonic() - start - sum(after.stages.values())))
            return found
        finally:
            await pool.close()

    for stage, cancelled, seconds, after, delay in asyncio.run(session()):
        assert cancelled.status is Status.CANCELLED, (stage, cancelled)
        assert seconds < 0.2, stage
        assert after.status is Status.CORRECT, (stage, after)
        assert delay < 2.0, stage


AHEAD = """self.side = self.side or torch.cuda.Stream()
with torch.cuda.stream(self.side):
    y = torch.softmax(x, -1) * self.weight
torch.cuda.current_stream().wait_stream(self.side)
return y"""


@pytest.mark.gpu(count=1)
def test_who_works_while_the_gpu_waits_for_the_host_works_on_the_former_inputs(tmp_path: Path) -> None:
    """A stream that waits for nothing could hide its work in the head start of a timed call."""

    async def session() -> Verdict:
        pool = LocalPool(workers=1, device="cuda:0", limits=replace(LIMITS, check_s=20), cache=tmp_path)
        await pool.start()
        try:
            return await pool.submit(TASK, Candidate(module(AHEAD, init="self.side = None")), search="test").verdict()
        finally:
            await pool.close()

    verdict = asyncio.run(session())
    assert verdict.status is Status.WRONG, verdict
    assert "in a timed call" in verdict.reason, verdict


@pytest.mark.gpu(count=1)
def test_a_kernel_s_time_is_that_of_its_graph_once_the_host_is_ahead(tmp_path: Path) -> None:
    async def session() -> Verdict:
        pool = LocalPool(workers=1, device="cuda:0", limits=replace(LIMITS, check_s=20), cache=tmp_path)
        await pool.start()
        try:
            return await pool.submit(LARGE, Candidate(module(LAUNCH, top=TRITON)), search="test").verdict()
        finally:
            await pool.close()

    verdict = asyncio.run(session())
    assert verdict.status is Status.CORRECT, verdict
    assert verdict.conditions["host_behind"]["candidate"] < 0.5, verdict
    assert verdict.candidate_ms == pytest.approx(verdict.extra_ms["candidate_graph"], rel=0.15), verdict
    assert len(verdict.conditions["rounds_ms"]) >= 3


HEAVY = Task(
    TASK.source.replace(
        "super().__init__()", "super().__init__(); self.kept = torch.nn.Parameter(torch.zeros(1 << 29))"
    ),
    "softmax beside 2 GiB of weights",
)
LEFT_GIB = 8
"""LARGE needs a little more, beside the contexts of two workers, where the judge of HEAVY keeps its weights."""


@pytest.mark.gpu(count=1)
def test_a_full_gpu_is_no_candidates_fault(tmp_path: Path) -> None:
    async def session() -> list[Verdict]:
        pool = LocalPool(workers=2, device="cuda:0", limits=replace(LIMITS, check_s=20), cache=tmp_path)
        await pool.start()
        try:
            heavy = await pool.submit(HEAVY, Candidate(module(LAUNCH, top=TRITON)), search="test").verdict()
            free, _ = torch.cuda.mem_get_info()
            ballast = torch.empty(max(0, free - (LEFT_GIB << 30)), dtype=torch.uint8, device="cuda:0")
            large = [
                pool.submit(LARGE, Candidate(module(LAUNCH, top=f"{TRITON}# {i}")), search="test") for i in range(3)
            ]
            crowded = [await job.verdict() for job in large]
            del ballast
            return [heavy, *crowded]
        finally:
            await pool.close()

    before = last_shortage("cuda:0")
    verdicts = asyncio.run(session())
    print([(verdict.status, verdict.conditions.get("made_again")) for verdict in verdicts])
    assert [verdict.status for verdict in verdicts] == [Status.CORRECT] * 4
    assert last_shortage("cuda:0") > before, "memory was short, and somebody was asked for it"

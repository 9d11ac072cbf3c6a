"""The same stages on a GPU."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from specgen_engine.evaluation.base import Candidate, Status, Verdict
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

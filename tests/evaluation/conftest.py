"""One warm pool for every test of this folder: a worker's start is 3 s of imports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specgen_engine.evaluation.base import Candidate, Task, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.local import LocalPool

TASK = Task(
    """
import torch
class Model(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))
    def forward(self, x):
        return torch.softmax(x, -1) * self.weight
def get_inputs():
    return [torch.randn(256, 512)]
def get_init_inputs():
    return [512]
""",
    "softmax",
)
LIMITS = EvaluationLimits(
    task_s=20, compile_s=60, check_s=3, time_s=10, timing_budget_s=0.2, memory_bytes=3 << 30, processes=24
)
Judge = Callable[..., Verdict]


class PoolThread:
    """A pool on an event loop of its own thread, driven from synchronous tests."""

    def __init__(self, folder: Path, limits: EvaluationLimits) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.pool = self.call(self._start(folder, limits), 120)

    async def _start(self, folder: Path, limits: EvaluationLimits) -> LocalPool:
        pool = LocalPool(workers=1, limits=limits, cache=folder)
        await pool.start()
        return pool

    def call(self, coroutine, seconds: float = 100):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def close(self) -> None:
        self.call(self.pool.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture(scope="session")
def pool_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolThread]:
    thread = PoolThread(tmp_path_factory.mktemp("builds"), LIMITS)
    yield thread
    thread.close()


@pytest.fixture(scope="session")
def judge(pool_thread: PoolThread) -> Judge:
    """judge(source, task=TASK) -> Verdict"""

    async def run(task: Task, source: str) -> Verdict:
        return await pool_thread.pool.submit(task, Candidate(source), search="test").verdict()

    return lambda source, task=TASK: pool_thread.call(run(task, source))


MODULE = """
import torch
{top}
class ModelNew(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width))
        {init}
    def forward(self, x):
        {body}
"""


def module(body: str = "return torch.softmax(x, -1) * self.weight", top: str = "", init: str = "pass") -> str:
    """A candidate for TASK; lines of body and init are indented here."""
    indent = "\n        "
    return MODULE.format(
        top=top, init=init.strip("\n").replace("\n", indent), body=body.strip("\n").replace("\n", indent)
    )

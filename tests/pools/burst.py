"""One burst of 300 light jobs, for every kind of live pool: the real worker, judge and sandbox, on a tiny task.

A tenth of the candidates is correct and goes through compile, check and timing; the others end in the check (wrong) or
in the import (compile_error, rejected). Every fifth job is a `time` stage, so that slots change roles.
"""

from __future__ import annotations

from typing import NamedTuple

from specgen_engine.evaluation.base import Candidate, Status, Task
from specgen_engine.evaluation.limits import EvaluationLimits

LIMITS = EvaluationLimits(
    task_s=30, compile_s=30, check_s=10, time_s=20, timing_budget_s=0.03, precision=1.0, check_seeds=1,
    memory_bytes=3 << 30, processes=24,
)  # fmt: skip
TASK = Task(
    """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return x * 2.0 + 1.0
def get_inputs():
    return [torch.randn(16, 64)]
def get_init_inputs():
    return []
""",
    "tiny",
)
MODULE = "import torch\nclass ModelNew(torch.nn.Module):\n    def forward(self, x):\n        return {}  # {}\n"
SOURCES = {
    Status.CORRECT: MODULE.format("torch.add(x * 2.0, 1.0)", "{}"),
    Status.WRONG: MODULE.format("x * 3.0", "{}"),
    Status.COMPILE_ERROR: "import torch  # {}\nx = 1\n",
    Status.REJECTED: "import torch  # {}\nimport socket\nclass ModelNew(torch.nn.Module): pass\n",
}
KILLED = {Status.CRASH, Status.RUNTIME_ERROR, Status.CANCELLED}
"""What a job may also end with when something that it needs is killed: its process, its judge, or it itself twice."""


class BurstJob(NamedTuple):
    id: str
    search: str
    stage: str
    candidate: Candidate
    expected: Status
    fork: int


def burst(jobs: int = 300) -> list[BurstJob]:
    out = []
    for number in range(jobs):
        status = {0: Status.CORRECT, 1: Status.WRONG, 2: Status.REJECTED}.get(number % 10, Status.COMPILE_ERROR)
        stage = "time" if number % 5 == 0 else "evaluate"
        source = Candidate(SOURCES[status].format(number))
        out.append(BurstJob(f"burst-{number}", f"s{number % 6}", stage, source, status, number))
    return out

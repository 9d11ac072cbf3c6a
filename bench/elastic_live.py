"""A burst on live workers, and the same burst simulated: with its own service times, and with those of the other runs.

    python -m bench.elastic --live [--devices cuda:0,cuda:1 --traces DIR] --json F

Each policy gets the same candidates at the same moments and its own empty build cache. A candidate is evaluated in the
validating role; one that passes its check goes on to the profiling role; feedback is there when its last job is over.
Without traces the candidates are synthetic and sleep in their first check, so that a busy CPU does not matter.
A GPU that is named several times in --devices has several workers; it is busy while one of them is.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.elastic_sim import FifoState, Simulation, parse_policy, percentile
from bench.elastic_workload import Candidate, Workload
from bench.spans import Span, common, length, union
from specgen_engine.evaluation import base
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.base import JobStage, busy_seconds
from specgen_engine.pools.job import PoolJob
from specgen_engine.pools.local import LocalPool
from specgen_engine.pools.policy import PolicyConfig, Role

TOLERANCE = 0.15
KINDS = {
    "live": "live",
    "simulated": "simulated",
    "apart": "simulated_over_live_minus_1",
    "predicted": "simulated_with_service_times_of_other_runs",
}
TASK = base.Task(
    "import torch\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x * 2.0 + 1.0\n"
    "def get_inputs():\n    return [torch.randn(16, 64)]\ndef get_init_inputs():\n    return []\n",
    "tiny",
)
SLEEPER = """
import time
import torch
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.left = {seconds}  # {number}
    def forward(self, x):
        time.sleep(self.left)
        self.left = 0.0
        return torch.{answer}
"""


class Arrival(NamedTuple):
    """A candidate at a moment of the burst, seconds."""

    number: int
    at: float
    search: int
    task: base.Task
    candidate: base.Candidate
    name: str


class Ran(NamedTuple):
    """One job of a live run; seconds of the run's clock. busy_s: of ended - began, on the GPU, taken to be at its end.

    gpu: what its worker's time is accounted to.
    """

    number: int
    role: Role
    queued: float
    began: float
    ended: float
    busy_s: float
    status: str
    gpu: str


def units(devices: list[str]) -> list[str]:
    """The GPUs of the workers, each once, as LocalBackend names them; a CPU worker counts as one."""
    return list(dict.fromkeys(f"cpu/{index}" if device == "cpu" else device for index, device in enumerate(devices)))


def moments(count: int, bursts: int, gap_s: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return sorted((number % bursts) * gap_s + rng.random() for number in range(count))


def synthetic(count: int, bursts: int, gap_s: float, seed: int) -> list[Arrival]:
    """A tenth is wrong; sleeps of 0.2 to 1.5 s."""
    rng = random.Random(seed)
    out = []
    for number, at in enumerate(moments(count, bursts, gap_s, seed)):
        answer = "add(x * 2.0, 1.0)" if number % 10 else "add(x * 3.0, 1.0)"
        source = SLEEPER.format(seconds=round(rng.uniform(0.2, 1.5), 3), number=number, answer=answer)
        out.append(Arrival(number, at, number % 4, TASK, base.Candidate(source), f"sleeper-{number}"))
    return out


def recorded(traces: Path, only: str, count: int, bursts: int, gap_s: float, seed: int) -> list[Arrival]:
    """Answers that hold Triton code, shuffled; a task is a search. Raises ValueError when there are too few."""
    from bench.evaluation import read_answers

    answers = [one for one in read_answers(traces, only) if one.kind == "triton"]
    if len(answers) < count:
        raise ValueError(f"--traces {traces}: {len(answers)} Triton answers match {only!r}, {count} are asked for")
    chosen = random.Random(seed).sample(answers, count)
    searches = {task: index for index, task in enumerate(dict.fromkeys(one.task.name for one in chosen))}
    times = moments(count, bursts, gap_s, seed)
    return [
        Arrival(number, at, searches[one.task.name], one.task, one.candidate, one.name)
        for number, (at, one) in enumerate(zip(times, chosen, strict=True))
    ]


async def run_live(
    policy: str,
    arrivals: list[Arrival],
    devices: list[str],
    stage: JobStage,
    config: PolicyConfig,
    limits: EvaluationLimits,
) -> list[Ran]:
    state, roles = parse_policy(policy, len(units(devices)), config)
    role_of = dict(zip(units(devices), roles, strict=True))
    chosen: dict[str, Any] = {"state": state} if isinstance(state, FifoState) else {}
    with tempfile.TemporaryDirectory(prefix="specgen-builds-") as cache:
        pool: LocalPool = LocalPool(
            devices=devices, limits=limits, cache=Path(cache), config=config, **chosen,
            first_role=lambda slot: role_of[_unit(pool, slot)],
        )  # fmt: skip
        try:
            await pool.start()
            await _all_ready(pool, len(devices))
            await asyncio.gather(*(pool.check_task(arrivals[0].task) for _ in devices))
            start = time.monotonic()
            rows = await asyncio.gather(*(_one(pool, arrival, start, stage) for arrival in arrivals))
        finally:
            await pool.close()
    return [row for candidate in rows for row in candidate]


def _unit(pool: LocalPool, slot: int | None) -> str:
    """The GPU of a worker; its own number for one that has died since."""
    worker = pool.backend.workers.get(slot)  # type: ignore[attr-defined]
    return worker.unit if worker is not None else f"slot {slot}"


async def _all_ready(pool: LocalPool, slots: int) -> None:
    while pool.snapshot()["ready"] != slots:  # noqa: ASYNC110 (the pool has no event for it, nor needs one elsewhere)
        await asyncio.sleep(0.05)


async def _one(pool: LocalPool, arrival: Arrival, start: float, stage: JobStage) -> list[Ran]:
    await asyncio.sleep(max(0.0, start + arrival.at - time.monotonic()))
    submitted, rows = time.monotonic(), []
    for role, asked in ((Role.VALIDATE, JobStage.EVALUATE), (Role.PROFILE, stage)):
        queued = time.monotonic() - start
        job: PoolJob = pool.submit(
            arrival.task, arrival.candidate, search=f"s{arrival.search}", stage=asked, fork=arrival.number,
            could_end=role is Role.PROFILE, since=submitted,
        )  # fmt: skip
        verdict = await job.verdict()
        ended = time.monotonic() - start
        busy_s, gpu = busy_seconds(verdict.stages), _unit(pool, job.slot)
        rows.append(Ran(arrival.number, role, queued, job.began - start, ended, busy_s, verdict.status, gpu))
        print(f"  {arrival.name} {_brief(rows[-1])} {verdict.reason[:120]}", flush=True)
        if base.Stage.TIME not in verdict.stages:  # its check did not pass
            break
    return rows


def _brief(row: Ran) -> str:
    return f"{row.role} {row.status} {row.gpu} {row.queued:.2f} {row.began:.2f} {row.ended:.2f} busy {row.busy_s:.2f}"


def busy_intervals(rows: list[Ran]) -> dict[str, list[Span]]:
    """When each GPU worked for one of its workers or several."""
    own: dict[str, list[Span]] = {}
    for row in rows:
        own.setdefault(row.gpu, []).append(Span(row.ended - row.busy_s, row.ended))
    return {gpu: union(intervals) for gpu, intervals in own.items()}


def figures_of(rows: list[Ran], arrivals: list[Arrival], gpus: int) -> dict[str, float]:
    """Of a live run, as the simulator counts: feedback from arrival to the last job's end, busy shares of the GPUs."""
    last: dict[int, float] = {}
    for row in rows:
        last[row.number] = max(last.get(row.number, 0.0), row.ended)
    first = {row.number: row.queued for row in rows if row.role is Role.VALIDATE}
    feedback = [last[arrival.number] - first[arrival.number] for arrival in arrivals]
    end = max(row.ended for row in rows)
    busy = list(busy_intervals(rows).values())
    waits = union(Span(row.queued, row.began) for row in rows)
    waits_s = length(waits)
    return {
        "mean_feedback_s": statistics.fmean(feedback),
        "p50_feedback_s": percentile(feedback, 0.5),
        "p95_feedback_s": percentile(feedback, 0.95),
        "utilisation_whole": sum(common(one, [Span(0.0, end)]) for one in busy) / (gpus * end),
        "utilisation": sum(common(one, waits) for one in busy) / (gpus * waits_s) if waits_s else 1.0,
    }


def simulated(
    policy: str, arrivals: list[Arrival], own: list[Ran], sources: list[list[Ran]], gpus: int, config: PolicyConfig
) -> dict[str, float]:
    """The same burst in virtual time: the jobs of this live run, with seconds that are means over the source runs."""
    times: dict[tuple[int, Role], tuple[float, float]] = {}
    for key in [(row.number, row.role) for row in own]:
        rows = [row for run in sources for row in run if (row.number, row.role) == key]
        rows = rows or [row for row in own if (row.number, row.role) == key]
        busy = statistics.fmean(row.busy_s for row in rows)
        times[key] = busy, max(0.0, statistics.fmean(row.ended - row.began for row in rows) - busy)
    candidates = []
    for one in arrivals:
        check, check_idle = times[one.number, Role.VALIDATE]
        profile, profile_idle = times.get((one.number, Role.PROFILE), (0.0, 0.0))
        correct = (one.number, Role.PROFILE) in times
        candidates.append(
            Candidate(one.number, one.search, 0, one.number, one.at, one.at, check, profile, correct, False,
                      check_idle, profile_idle)
        )  # fmt: skip
    searches = 1 + max(one.search for one in arrivals)
    load = Workload("live", gpus, searches, 0, arrivals[-1].at + 1e-3, tuple(candidates), (0.0,) * searches)
    state, roles = parse_policy(policy, gpus, config)
    simulation = Simulation(load, state, config)
    simulation.run(roles)
    result = simulation.result()
    return {
        "mean_feedback_s": statistics.fmean(simulation.feedback),
        "p50_feedback_s": result.p50_feedback_s,
        "p95_feedback_s": result.p95_feedback_s,
        "utilisation_whole": result.utilisation_whole,
        "utilisation": result.utilisation,
    }


def compare(arrivals: list[Arrival], devices: list[str], stage: JobStage, limits: EvaluationLimits) -> dict[str, Any]:
    """Live and simulated figures by policy, and how far they are apart.

    The simulator's GPUs take a job at a time: with several workers a GPU nothing is simulated.
    """
    gpus = len(units(devices))
    config = replace(PolicyConfig(), switch_s=0.0)  # a worker takes any job: roles say which ones come
    splits = [f"static-{one}-{gpus - one}" for one in range(1, gpus)]
    runs: dict[str, list[Ran]] = {}
    for policy in ("elastic", *splits, "fifo"):
        print(f"{policy}: candidate, role, status, GPU, queued, began, ended, busy seconds")
        runs[policy] = asyncio.run(run_live(policy, arrivals, devices, stage, config, limits))
    report: dict[str, Any] = {
        "devices": devices,
        "candidates": len(arrivals),
        "profile_stage": stage.value,
        "policies": {},
    }
    for policy, rows in runs.items():
        live = figures_of(rows, arrivals, gpus)
        report["policies"][policy] = {
            "live": _rounded(live),
            "jobs": [{**row._asdict(), "role": row.role.value} for row in rows],
        }
        if len(devices) > gpus:
            continue
        others = [run for name, run in runs.items() if name != policy]
        model = simulated(policy, arrivals, rows, [rows], gpus, config)
        predicted = simulated(policy, arrivals, rows, others, gpus, config)
        apart = {name: model[name] / live[name] - 1 for name in live}
        report["policies"][policy] |= {
            "simulated": _rounded(model), "simulated_over_live_minus_1": _rounded(apart),
            "within_15_percent": all(abs(value) <= TOLERANCE for value in apart.values()),
            "simulated_with_service_times_of_other_runs": _rounded(predicted),
        }  # fmt: skip
    report["names"] = {one.number: one.name for one in arrivals}
    report["arrivals_s"] = [round(one.at, 3) for one in arrivals]
    return report


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def lines(report: dict[str, Any]) -> list[str]:
    """A table for people."""
    out = [f"{'policy':<12} {'':<10} {'mean s':>8} {'p50 s':>8} {'p95 s':>8} {'whole':>7} {'waits':>7}"]
    keys = {"mean_feedback_s": 8, "p50_feedback_s": 8, "p95_feedback_s": 8, "utilisation_whole": 7, "utilisation": 7}
    for policy, row in report["policies"].items():
        for name, kind in KINDS.items():
            if kind not in row:
                continue
            values = " ".join(f"{row[kind][key]:>{width}.3f}" for key, width in keys.items())
            out.append(f"{policy if kind == 'live' else '':<12} {name:<10} {values}")
    return out

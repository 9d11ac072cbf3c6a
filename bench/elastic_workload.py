"""Arrivals and service times of the elastic study: fitted to recorded runs, drawn once a seed for all policies."""

from __future__ import annotations

import json
import math
import random
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

TIMED_RUNS = 15
REPETITIONS = 100
NCU_S = 2.5
FULL_NCU_S = 12.0
CHECK_MOST_S = 60.0
ITERATION_S = 180.0
BURST = 10


class ServiceError(ValueError):
    """A scores file that cannot be fitted."""


@dataclass(frozen=True, slots=True)
class ServiceFit:
    """Log-normal service times, seconds. A task has its own mean check time; answers of a task vary around it.

    The defaults are fitted to the 84 answers of ten tasks in the recorded scores.json (one NVIDIA H200; import_s is the
    compile, in which 10-15 others ran on 16 cores; time_s covers 15 timed runs). Timing is taken as REPETITIONS runs.
    What ncu adds is not in the recording: NCU_S (sections chosen by bound) and FULL_NCU_S are assumptions.
    """

    check_log_mean: float = 1.293
    check_log_task_sd: float = 1.178
    check_log_sd: float = 0.272
    jit_share: float = 0.643
    jit_log_mean: float = -1.748
    jit_log_sd: float = 0.289
    nvcc_log_mean: float = 3.709
    nvcc_log_sd: float = 0.281
    time_log_mean: float = -3.233
    time_log_sd: float = 0.862
    correct: float = 77 / 84
    source: str = "fitted constants"


def fit_scores(path: Path) -> ServiceFit:
    """Fit to a scores.json: answers with import_s, check_s, time_s and status. Raises ServiceError with one line."""
    try:
        answers = json.loads(path.read_text())["answers"]
        checks: dict[str, list[float]] = defaultdict(list)
        for name, answer in answers.items():
            if answer.get("check_s"):
                checks["/".join(name.split("/")[:2])].append(math.log(answer["check_s"]))
        compiles = [math.log(answer["import_s"]) for answer in answers.values()]
        jit, nvcc = [one for one in compiles if one < 0], [one for one in compiles if one >= 0]
        timing = [math.log(answer["time_s"]) for answer in answers.values() if answer.get("time_s")]
        means = [statistics.mean(one) for one in checks.values()]
        return ServiceFit(
            check_log_mean=statistics.mean(means),
            check_log_task_sd=statistics.stdev(means),
            check_log_sd=math.sqrt(statistics.mean(statistics.pvariance(one) for one in checks.values())),
            jit_share=len(jit) / len(compiles),
            jit_log_mean=statistics.mean(jit),
            jit_log_sd=statistics.stdev(jit),
            nvcc_log_mean=statistics.mean(nvcc),
            nvcc_log_sd=statistics.stdev(nvcc),
            time_log_mean=statistics.mean(timing),
            time_log_sd=statistics.stdev(timing),
            correct=sum(answer["status"] == "correct" for answer in answers.values()) / len(answers),
            source=path.name,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ServiceError(
            f"--scores {path}: {type(error).__name__}: {error}; use a scores.json of recorded answers"
        ) from None


@dataclass(frozen=True, slots=True)
class Scenario:
    """load: GPU-seconds offered, as a share of the pool's, over the run. ncu_s: profiling's, at its start and end.

    shape: arrival rate at a share of the run, any scale.  burst: candidates of one search that arrive within a second.
    ends: share of correct candidates that end their reasoning.  skew: how unequal searches are (0: equal).
    """

    name: str
    load: float
    shape: Callable[[float], float]
    ncu_s: tuple[float, float] = (NCU_S, NCU_S)
    burst: int = 1
    ends: float = 0.03
    skew: float = 0.0


def _on_off(share: float) -> float:
    return 1.0 if int(share * 10) % 2 == 0 else 0.08


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("steady-validate", 0.85, lambda share: 1.0),
        Scenario("steady-profile", 0.85, lambda share: 1.0, ncu_s=(FULL_NCU_S, FULL_NCU_S)),
        Scenario("bursts", 0.75, lambda share: 1.0, burst=BURST),
        Scenario("on-off", 0.7, _on_off),
        Scenario("ramp", 0.75, lambda share: 0.3 + share, ncu_s=(NCU_S, FULL_NCU_S)),
        Scenario("contended", 1.3, lambda share: 1.0, ends=0.0, skew=1.0),
    )
}


class Candidate(NamedTuple):
    """One candidate with everything that will happen to it. ready_s: compiled, after submitted_s.

    check_idle_s, profile_idle_s: for how long its job holds a GPU without working on it (a live pool compiles there).
    """

    number: int
    search: int
    iteration: int
    fork: int
    submitted_s: float
    ready_s: float
    check_s: float
    profile_s: float
    correct: bool
    ends: bool
    check_idle_s: float = 0.0
    profile_idle_s: float = 0.0


class Workload(NamedTuple):
    """candidates in order of ready_s. length_s: in which they are submitted.  offsets: of the first reasonings."""

    scenario: str
    gpus: int
    searches: int
    seed: int
    length_s: float
    candidates: tuple[Candidate, ...]
    offsets: tuple[float, ...]


class _Draw(NamedTuple):
    search: int
    at: float
    check_s: float
    profile_s: float
    compile_s: float
    correct: bool
    ends: bool


def workload(
    scenario: Scenario, gpus: int, searches: int, seed: int, length_s: float, fit: ServiceFit | None = None
) -> Workload:
    """Candidates until they need load x gpus x length_s GPU-seconds; forks of a search are numbered in time."""
    fit = fit or ServiceFit()
    rng = random.Random(f"{scenario.name}/{gpus}/{searches}/{seed}")
    moments = _moments(scenario, length_s)
    tasks = [rng.gauss(fit.check_log_mean, fit.check_log_task_sd) for _ in range(searches)]
    weights = list(accumulate(rng.lognormvariate(0.0, scenario.skew) for _ in range(searches)))
    offsets = tuple(rng.uniform(0, ITERATION_S) for _ in range(searches))
    left = scenario.load * gpus * length_s
    draws: list[_Draw] = []
    while left > 0:
        search = bisect_left(weights, rng.uniform(0, weights[-1]))
        start = moments(rng.random())
        for _ in range(scenario.burst):
            at = start + (rng.random() if scenario.burst > 1 else 0.0)
            draw = _draw(rng, scenario, fit, search, tasks[search], at, at / length_s)
            left -= draw.check_s + draw.profile_s
            draws.append(draw)
    draws.sort(key=lambda one: one.at)
    return Workload(scenario.name, gpus, searches, seed, length_s, _number(draws, offsets), offsets)


def _draw(
    rng: random.Random, scenario: Scenario, fit: ServiceFit, search: int, task: float, at: float, share: float
) -> _Draw:
    check = min(CHECK_MOST_S, rng.lognormvariate(task, fit.check_log_sd))
    first, last = scenario.ncu_s
    timing = rng.lognormvariate(fit.time_log_mean, fit.time_log_sd) * REPETITIONS / TIMED_RUNS
    ncu = (first + (last - first) * min(1.0, share)) * rng.uniform(0.8, 1.2)
    jit = rng.random() < fit.jit_share
    compile_s = (
        rng.lognormvariate(fit.jit_log_mean, fit.jit_log_sd)
        if jit
        else rng.lognormvariate(fit.nvcc_log_mean, fit.nvcc_log_sd)
    )
    correct = rng.random() < fit.correct
    ends = rng.random() < scenario.ends
    return _Draw(search, at, check, timing + ncu if correct else 0.0, compile_s, correct, correct and ends)


def _number(draws: list[_Draw], offsets: tuple[float, ...]) -> tuple[Candidate, ...]:
    forks: dict[int, int] = defaultdict(int)
    out = []
    for number, one in enumerate(draws):
        forks[one.search] += 1
        iteration = int((one.at + offsets[one.search]) / ITERATION_S)
        ready = one.at + one.compile_s
        out.append(
            Candidate(
                number, one.search, iteration, forks[one.search], one.at, ready,
                one.check_s, one.profile_s, one.correct, one.ends,
            )
        )  # fmt: skip
    return tuple(sorted(out, key=lambda candidate: candidate.ready_s))


def _moments(scenario: Scenario, length_s: float) -> Callable[[float], float]:
    """Inverse of the arrival rate's integral: a uniform number becomes a moment of the run."""
    steps = 1000
    total = list(accumulate(scenario.shape((step + 0.5) / steps) for step in range(steps)))

    def moment(uniform: float) -> float:
        wanted = uniform * total[-1]
        step = bisect_left(total, wanted)
        before = total[step - 1] if step else 0.0
        return (step + (wanted - before) / (total[step] - before)) / steps * length_s

    return moment

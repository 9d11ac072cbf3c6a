"""How long quick candidates wait beside long C++ builds: simulated, the pool's own policy decides.

python -m bench.elastic_builds [--seeds 20] [--json F]

Nine searches submit to one GPU with six slots for ten minutes, a candidate each 17 s. Three ways: slots build and
nothing tells builds apart (workers), slots build and keep some free of them (share), builders build (builders).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.elastic_sim import percentile
from bench.machine import new_report, write_report
from specgen_engine.pools.policy import JobView, Role
from specgen_engine.pools.policy_builds import builds_at_once
from specgen_engine.pools.policy_state import PoolState

SEARCHES, SLOTS, CORES, LENGTH_S, EVERY_S = 9, 6, 32, 600.0, 17.0
QUICK_S = 1.1
"""Compile, check and time of a Triton candidate: 0.2, 0.6 and 0.3 s."""
BUILD_S, BUILD_SD = 62.0, 0.1
"""Median and standard deviation of the logarithm: 58-66 s were seen beside five others."""
JUDGE_S = 0.3
AGAIN_S = 0.7
"""Assumed: what importing a library that a builder made takes a slot, with its context."""
WAYS = ("workers", "share", "builders")


class Arrival(NamedTuple):
    """build_s: 0 without one."""

    at: float
    search: int
    fork: int
    build_s: float


class Waits(NamedTuple):
    """Of one run, seconds. quick_*: in the queue.  build_*: submission to verdict of those with a build."""

    quick_p50: float
    quick_p95: float
    quick_max: float
    build_p50: float
    build_p95: float


def arrivals(seed: int, share: float) -> list[Arrival]:
    """share: of the candidates, that have a build."""
    draw = random.Random(seed)
    out = []
    for search in range(SEARCHES):
        at, fork = 0.0, 0
        while (at := at + draw.expovariate(1 / EVERY_S)) < LENGTH_S:
            fork += 1
            build_s = BUILD_S * draw.lognormvariate(0.0, BUILD_SD) if draw.random() < share else 0.0
            out.append(Arrival(at, search, fork, build_s))
    return sorted(out)


class Run:
    """Events in order of time; the state is told of each, then decides."""

    def __init__(self, load: list[Arrival], way: str) -> None:
        self.way, self.load = way, load
        self.state = PoolState(build_slots=builds_at_once(CORES) if way == "builders" else None)
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.order = itertools.count()
        self.now = 0.0
        self.quick: list[float] = []
        self.built: list[float] = []

    def go(self) -> Waits:
        for search in range(SEARCHES):
            self.state.add_search(f"s{search}")
        for slot in range(SLOTS):
            self.state.add_gpu(slot, Role.VALIDATE)
        for number, one in enumerate(self.load):
            self.at(one.at, partial(self.submit, number, one))
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            event()
            self.decide()
        return Waits(
            percentile(self.quick, 0.5), percentile(self.quick, 0.95), max(self.quick),
            percentile(self.built, 0.5), percentile(self.built, 0.95),
        )  # fmt: skip

    def at(self, when: float, event: Callable[[], object]) -> None:
        heapq.heappush(self.events, (when, next(self.order), event))

    def submit(self, number: int, one: Arrival) -> None:
        search = f"s{one.search}"
        builds = "cuda_inline" if one.build_s and self.way != "workers" else ""
        expected = self.state.expected_s(search, Role.VALIDATE, 5.0)
        self.state.submit(
            JobView(str(number), search, Role.VALIDATE, self.now, expected, one.fork, builds=builds), self.now
        )

    def decide(self) -> None:
        decision = self.state.decide(self.now)
        for job in decision.builds:
            took = self.load[int(job.id)].build_s
            self.at(self.now + took, partial(self.state.built, job.id, took))
        for assignment in decision.assignments:
            assert assignment.job is not None
            one = self.load[int(assignment.job.id)]
            if not one.build_s:
                self.quick.append(self.now - one.at)
            took = self.service_s(one)
            self.at(self.now + took, partial(self.end, assignment.gpu, one, took))

    def service_s(self, one: Arrival) -> float:
        if not one.build_s:
            return QUICK_S
        return JUDGE_S + (AGAIN_S if self.way == "builders" else one.build_s)

    def end(self, slot: int, one: Arrival, took: float) -> None:
        self.state.release(slot, self.now, took)
        if one.build_s:
            self.built.append(self.now - one.at)


def study(seeds: int, share: float) -> dict[str, Waits]:
    """Medians over seeds, by way."""
    out = {}
    for way in WAYS:
        runs = [Run(arrivals(seed, share), way).go() for seed in range(seeds)]
        out[way] = Waits(*(percentile(values, 0.5) for values in zip(*runs, strict=True)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    print("| C++ share | way | quick waits p50 / p95 / most, s | C++ to verdict p50 / p95, s |\n|---|---|---|---|")
    for share in (0.1, 0.25, 0.4):
        for way, waits in study(given.seeds, share).items():
            rows.append({"share": share, "way": way, **waits._asdict()})
            quick = f"{waits.quick_p50:.1f} / {waits.quick_p95:.1f} / {waits.quick_max:.1f}"
            print(f"| {share} | {way} | {quick} | {waits.build_p50:.0f} / {waits.build_p95:.0f} |")
    if given.json:
        report = new_report("specgen.elastic_builds/1", 0) | {"kind": "simulated", "seeds": given.seeds, "rows": rows}
        write_report(given.json, report)


if __name__ == "__main__":
    main()

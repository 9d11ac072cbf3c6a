"""Which C++ builds begin, and how many at once: a build takes a minute, and must keep no quick candidate waiting.

Where a pool has builders, a candidate takes a slot only once its library is built. Where it has none, candidates with a
build may hold all slots but a few. Pure functions, and the line in which those wait that are to be built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from .policy import JobView

SERVING_SHARE = 0.25
"""Of a host's cores, left to who serves beside the builds."""
CORES_A_BUILD = 2.5
"""Two processes at most (MAX_JOBS=2), and what starts and follows them."""
QUICK_SHARE = 1 / 3
"""Of the slots, that candidates without a build find free of builds, where slots build themselves."""
QUICK_PER_S = 0.005
"""Arrivals of candidates without a build, below which nothing is kept free for them: one in three minutes."""
FIRST_BUILD_S = 45.0
"""Expected of a kind that was never built: the median of 30 recorded ones was 41 s."""
SUPERSEDED_S = 60.0
"""Seconds of age by which a build waits longer once a newer fork of its search is to be built too."""
LEARNT = 0.3
"""Weight of a new build in its kind's expectation."""


class BuildLoad(NamedTuple):
    """Of the search whose build waits. newest: the newest fork to be built.  under_way: builds that run now."""

    newest: int
    under_way: int


def builds_at_once(cores: int) -> int:
    """Builds that a host makes at once, at least one."""
    return max(1, int(cores * (1 - SERVING_SHARE) / CORES_A_BUILD))


def builds_beside(slots: int, quick_per_s: float) -> int:
    """Slots that candidates with a build may hold, where they are built: all, unless quick ones come too."""
    if quick_per_s < QUICK_PER_S:
        return max(1, slots)
    return max(1, slots - max(1, round(slots * QUICK_SHARE)))


def build_key(job: JobView, load: BuildLoad, expected_s: float) -> tuple[bool, float]:
    """Builds begin in this order: what a client waits for, then what could end a reasoning soonest, by age otherwise.

    A search's second build waits as long again as the first takes, a superseded one a minute more; none for ever.
    """
    handicap = expected_s * (1 + load.under_way) + SUPERSEDED_S * (job.fork < load.newest)
    return not job.could_end, job.submitted + handicap


class BuildLine:
    """Jobs that wait to be built or are. slots: how many builds the pool's builders make at once; None: it has none.

    Without builders a job is let through to the slots, and counts until it leaves them (held).
    """

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots
        self.waiting: dict[str, JobView] = {}
        self.building: dict[str, JobView] = {}
        self.held: dict[str, JobView] = {}
        self._ending: set[str] = set()  # cancelled, their processes still end
        self._expected: dict[str, float] = {}

    def __iter__(self) -> Iterator[JobView]:
        """Those that no slot and no queue has."""
        yield from self.waiting.values()
        yield from self.building.values()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self.waiting or job_id in self.building

    def expected_s(self, kind: str) -> float:
        return self._expected.get(kind, FIRST_BUILD_S)

    def free(self, slots: int, quick_per_s: float) -> int:
        """Builds that may begin now. slots: of the pool, where it builds in them."""
        if self.slots is not None:
            return self.slots - len(self.building) - len(self._ending)
        return builds_beside(slots, quick_per_s) - len(self.held)

    def begin(self) -> JobView:
        """The next build of those that wait: from now on it is built, or held by a slot."""
        under_way = Counter(job.search for job in (*self.building.values(), *self.held.values()))
        newest: dict[str, int] = {}
        for one in (*self.waiting.values(), *self.building.values(), *self.held.values()):
            newest[one.search] = max(one.fork, newest.get(one.search, one.fork))

        def key(job: JobView) -> tuple[bool, float]:
            load = BuildLoad(newest[job.search], under_way[job.search])
            return build_key(job, load, self.expected_s(job.builds))

        job = self.waiting.pop(min(self.waiting.values(), key=key).id)
        (self.held if self.slots is None else self.building)[job.id] = job
        return job

    def built(self, job_id: str, seconds: float | None) -> JobView | None:
        """A builder is done with a job: returns it, None when it was cancelled. seconds: None: it says nothing."""
        self._ending.discard(job_id)
        job = self.building.pop(job_id, None)
        if job is not None and seconds is not None:
            known = self._expected.get(job.builds, seconds)
            self._expected[job.builds] = known + LEARNT * (seconds - known)
        return job

    def cancel(self, job_id: str) -> JobView | None:
        """Returns the job if it was here. A build that runs keeps its place until built() says that it has ended."""
        job = self.waiting.pop(job_id, None)
        if job is None and job_id in self.building:
            job = self.building.pop(job_id)
            self._ending.add(job_id)
        return job

    def leave(self, job_id: str) -> None:
        """A job is no longer with the slots."""
        self.held.pop(job_id, None)

    def lose_builders(self) -> None:
        """From now on slots build."""
        self.slots = None
        self._ending.clear()

"""Waiting jobs of one role, fair between searches: push, pop and cancel cost O(log searches)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .policy import JobView, PolicyConfig, Urgency, age_key, fair_key, urgency


@dataclass(slots=True)
class SearchState:
    """What the pool knows of a search, over both roles. attained_s: GPU-seconds given, expected until measured."""

    weight: float = 1.0
    attained_s: float = 0.0
    newest_fork: int = 0
    waiting: int = 0
    running: int = 0


class Waiting(NamedTuple):
    """Entry of the heap of searches; stale once the search's key has changed."""

    key: float
    number: int
    search: str


@dataclass(slots=True)
class _Line:
    """Jobs of one search in one role. ends: by priority, expected seconds, age; forks: in order of submission."""

    ends: list[tuple[float, float, int, JobView]] = field(default_factory=list)
    forks: deque[JobView] = field(default_factory=deque)
    number: int = -1


class FairQueue:
    """Searches by attained GPU-seconds, jobs of a search by urgency (policy.age_key, fair_key, policy.urgency).

    Cancelled jobs leave at once from the counts and lazily from the lines. searches is shared by the queues of a pool.
    """

    def __init__(self, searches: dict[str, SearchState], config: PolicyConfig) -> None:
        self.searches, self.config = searches, config
        self.jobs: dict[str, JobView] = {}
        self.waiting_s = 0.0
        self._lines: dict[str, _Line] = {}
        self._by_share: list[Waiting] = []
        self._by_age: list[Waiting] = []
        self._ages: list[tuple[float, int, JobView]] = []
        self._numbers = 0

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[JobView]:
        return iter(self.jobs.values())

    @property
    def oldest(self) -> float:
        """Submission time of the oldest waiting job, inf when none waits."""
        while self._ages and not self._waits(self._ages[0][-1]):
            heapq.heappop(self._ages)
        return self._ages[0][0] if self._ages else float("inf")

    def push(self, job: JobView) -> None:
        self._numbers += 1
        self.jobs[job.id] = job
        self.waiting_s += job.expected_s
        heapq.heappush(self._ages, (job.submitted, self._numbers, job))
        line = self._lines.setdefault(job.search, _Line())
        if job.could_end:
            heapq.heappush(line.ends, (-job.priority, job.expected_s, self._numbers, job))
        else:
            place = len(line.forks)
            while place and job.submitted < line.forks[place - 1].submitted:  # one that is retried, or was built
                place -= 1
            line.forks.insert(place, job)
        self.refresh(job.search)

    def pop(self, *, fair: bool) -> JobView | None:
        """The next job, removed; None when nothing waits. The caller charges its search, then calls refresh.

        fair: by attained GPU-seconds of the searches, else by age (policy.fairness_binds).
        """
        heap = self._by_share if fair else self._by_age
        while heap:
            first = heapq.heappop(heap)
            if not self._current(first):
                continue
            line = self._lines[first.search]
            line.number = -1
            job = self._take(line, self.searches[first.search].newest_fork)
            if job is None:
                del self._lines[first.search]
                continue
            self._forget(job)
            return job
        return None

    def refresh(self, search: str) -> None:
        """Put a search where its present key belongs; called whenever attained seconds or lines have changed."""
        line = self._lines.get(search)
        if line is None:
            return
        first = self._first(line, self.searches[search].newest_fork)
        if first is None:
            del self._lines[search]
            return
        state = self.searches[search]
        self._numbers += 1
        line.number = self._numbers
        oldest = (line.forks[0] if line.forks else line.ends[0][-1]).submitted
        fair = fair_key(state.attained_s, state.weight, first, self.config)
        heapq.heappush(self._by_share, Waiting(fair, line.number, search))
        heapq.heappush(self._by_age, Waiting(age_key(oldest, first, self.config), line.number, search))
        self._by_share, self._by_age = self._compact(self._by_share), self._compact(self._by_age)

    def _compact(self, heap: list[Waiting]) -> list[Waiting]:
        """Without its stale entries where that is cheap; all of them only once they outnumber the searches by far."""
        while heap and not self._current(heap[0]):
            heapq.heappop(heap)
        if len(heap) <= 64 + 32 * len(self._lines):
            return heap
        kept = [one for one in heap if self._current(one)]
        heapq.heapify(kept)
        return kept

    def remove(self, job_id: str) -> JobView | None:
        job = self.jobs.get(job_id)
        if job is not None:
            self._forget(job)
            self.refresh(job.search)
        return job

    def of_search(self, search: str) -> list[JobView]:
        line = self._lines.get(search)
        jobs = [] if line is None else [*(entry[-1] for entry in line.ends), *line.forks]
        return [job for job in jobs if self._waits(job)]

    def _current(self, entry: Waiting) -> bool:
        line = self._lines.get(entry.search)
        return line is not None and line.number == entry.number

    def _waits(self, job: JobView) -> bool:
        return self.jobs.get(job.id) is job

    def _forget(self, job: JobView) -> None:
        del self.jobs[job.id]
        self.waiting_s = self.waiting_s - job.expected_s if self.jobs else 0.0

    def _trim(self, line: _Line) -> None:
        while line.ends and not self._waits(line.ends[0][-1]):
            heapq.heappop(line.ends)
        while line.forks and not self._waits(line.forks[0]):
            line.forks.popleft()
        while line.forks and not self._waits(line.forks[-1]):
            line.forks.pop()

    def _first(self, line: _Line, newest_fork: int) -> Urgency | None:
        self._trim(line)
        if line.ends:
            return Urgency.ENDS
        if not line.forks:
            return None
        return urgency(line.forks[-1], newest_fork)

    def _take(self, line: _Line, newest_fork: int) -> JobView | None:
        first = self._first(line, newest_fork)
        if first is None:
            return None
        if first is Urgency.ENDS:
            return heapq.heappop(line.ends)[-1]
        if first is Urgency.NEWEST and line.forks[-1].fork > line.forks[0].fork:
            return line.forks.pop()
        return line.forks.popleft()

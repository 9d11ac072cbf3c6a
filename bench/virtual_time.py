"""One search in virtual time: a recorded reasoning, its recorded answers, and a model of engine and evaluators.

The same triggers, criteria and wait for late candidates as in the live system run here. Fork slowdown: 0.9 % for one
400-token fork every 400 tokens of one base, 9 % with eight bases and as many forks, on one H200 (DESIGN.md): about 1 %
a fork in flight.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from specgen_engine.controller.grace import own_grace_s
from specgen_engine.controller.termination import Criterion, Decision, Never, Progress, Scored, best, watches_progress
from specgen_engine.evaluation.base import Status
from specgen_engine.pools.policy import late_s


@dataclass(frozen=True, slots=True)
class Machine:
    """tokens_per_s: one request's decode rate; prefill_s: a fork's time to first token with a reused prefix;
    max_forks: in flight at once; evaluators: GPUs that check and time; compilers: candidates compiled at once;
    grace_s: what candidates without a verdict get at most once the base has answered (--specgen-grace-s)."""

    tokens_per_s: float
    fork_slowdown: float = 0.01
    prefill_s: float = 0.1
    max_forks: int = 8
    evaluators: int = 3
    compilers: int = 8
    grace_s: float = 30.0


class Answer(NamedTuple):
    """A recorded answer: its length, and what its evaluation gave and took (seconds on CPU, then on the GPU)."""

    label: str
    hash: str
    tokens: int
    status: Status
    speedup: float | None
    compile_s: float
    gpu_s: float


@dataclass(frozen=True, slots=True)
class Recording:
    """tokens: of the reasoning; marks: token position of each fork answer, ascending."""

    name: str
    family: str
    tokens: int
    marks: tuple[int, ...]
    forks: tuple[Answer, ...]
    final: Answer

    def answer_at(self, position: int) -> Answer | None:
        found = None
        for mark, answer in zip(self.marks, self.forks, strict=True):
            if mark > position:
                break
            found = answer
        return found


class View(NamedTuple):
    """What a policy may know when one of its points is reached: tokens, and nothing of the recording's future.

    fork_tokens: of all forks so far, those in flight included.
    """

    position: int
    last_fork: int
    in_flight: int
    waiting: int
    best_speedup: float
    distinct: int
    forks: int = 0
    fork_tokens: int = 0


class Outcome(NamedTuple):
    """A finished search; accepted is None when no candidate was correct. Seconds are virtual.

    curve: (seconds, best correct speed-up since then), ascending; correct: distinct correct candidates, the base's own
    included where it was judged.
    """

    seconds: float
    ended_by: str
    accepted: Scored | None
    forks: int
    fork_tokens: int
    verdicts: int
    base_tokens: int
    curve: tuple[tuple[float, float], ...] = ()
    correct: int = 0

    def best_at(self, seconds: float) -> float | None:
        """The best correct speed-up known at a time, None before the first."""
        return next((speedup for since, speedup in reversed(self.curve) if since <= seconds), None)


ASK_TOKENS = 100
"""How often a criterion that looks at time or tokens is asked between two verdicts."""

Admit = Callable[[View], bool]
Observe = Callable[[View, float, int], None]


class _Fork(NamedTuple):
    answer: Answer | None
    view: View
    began_at: float
    ends_at: float


@dataclass(slots=True)
class _Evaluators:
    """Two stages, each first come first served with the base's own answer in front; completions by time."""

    machine: Machine
    queues: tuple[list, list] = field(default_factory=lambda: ([], []))
    busy: list[int] = field(default_factory=lambda: [0, 0])
    running: list = field(default_factory=list)
    count: int = 0

    def submit(self, now: float, answer: Answer, source: str, stage: int = 0) -> None:
        self.count += 1
        heapq.heappush(self.queues[stage], (source != "base", self.count, answer, source))
        self._start(now, stage)

    def _start(self, now: float, stage: int) -> None:
        slots = (self.machine.compilers, self.machine.evaluators)[stage]
        while self.queues[stage] and self.busy[stage] < slots:
            _, order, answer, source = heapq.heappop(self.queues[stage])
            self.busy[stage] += 1
            took = (answer.compile_s, answer.gpu_s)[stage]
            heapq.heappush(self.running, (now + took, order, stage, answer, source))

    def next_time(self) -> float:
        return self.running[0][0] if self.running else math.inf

    def complete(self) -> tuple[Answer, str] | None:
        """Finish the earliest running stage; the answer and its source when that was its last one."""
        now, _, stage, answer, source = heapq.heappop(self.running)
        self.busy[stage] -= 1
        self._start(now, stage)
        if stage == 0:
            self.submit(now, answer, source, stage=1)
            return None
        return answer, source

    def waiting(self) -> int:
        return len(self.queues[0]) + len(self.queues[1])

    def keep(self, now: float, name: str) -> None:
        """Cancel all but the candidate with this hash."""
        for stage, queue in enumerate(self.queues):
            queue[:] = [entry for entry in queue if entry[2].hash == name]
            self.running = [entry for entry in self.running if entry[3].hash == name]
            self.busy[stage] = sum(entry[2] == stage for entry in self.running)
            self._start(now, stage)


def _always(view: View) -> bool:
    return True


class _Search:
    """State of one search while its virtual time runs; see ``run_search``."""

    def __init__(self, recording: Recording, machine: Machine, criterion: Criterion, observe: Observe | None):
        self.recording, self.machine, self.criterion, self.observe = recording, machine, criterion, observe
        self.now = self.base = self.fork_tokens = 0.0
        self.active: list[_Fork] = []
        self.work = 0.0
        self.evaluators = _Evaluators(machine)
        self.scored: list[Scored] = []
        self.curve: list[tuple[float, float]] = []
        self.submitted: dict[str, View] = {}
        self.forks, self.last_fork = 0, 0
        self.evaluator_s = 0.0
        self.blank_tokens = recording.forks[0].tokens if recording.forks else 1

    def view(self, position: int) -> View:
        top = best(self.scored)
        speed = top.speedup if top and top.speedup else 0.0
        waiting = self.evaluators.waiting()
        spent = round(self.fork_tokens)
        return View(position, self.last_fork, len(self.active), waiting, speed, len(self.submitted), self.forks, spent)

    def rate(self) -> float:
        return self.machine.tokens_per_s / (1 + self.machine.fork_slowdown * len(self.active))

    def fork(self, position: int, admit: Admit) -> None:
        view = self.view(position)
        if len(self.active) >= self.machine.max_forks or not admit(view):
            return
        answer = self.recording.answer_at(position)
        tokens = (answer.tokens if answer else self.blank_tokens) + self.machine.prefill_s * self.machine.tokens_per_s
        self.active.append(_Fork(answer, view, self.work, self.work + tokens))
        self.forks, self.last_fork = self.forks + 1, position

    def advance(self, seconds: float) -> None:
        tokens = seconds * self.rate()
        self.now, self.base, self.work = self.now + seconds, self.base + tokens, self.work + tokens
        self.fork_tokens += tokens * len(self.active)

    def finish_forks(self) -> None:
        for fork in [one for one in self.active if one.ends_at <= self.work + 1e-6]:
            self.active.remove(fork)
            fresh = fork.answer is not None and fork.answer.hash not in self.submitted
            if fresh and fork.answer is not None:
                self.submitted[fork.answer.hash] = fork.view
                self.evaluators.submit(self.now, fork.answer, "fork")
            elif self.observe:
                self.observe(fork.view, 0.0, fork.answer.tokens if fork.answer else self.blank_tokens)

    def verdict(self, answer: Answer, source: str) -> bool:
        """Record one verdict; True when the search ends with it."""
        at_token = self.submitted[answer.hash].position if source == "fork" else round(self.base)
        self.evaluator_s += answer.compile_s + answer.gpu_s
        self.scored.append(
            Scored(answer.hash, answer.status, answer.speedup, source, len(self.scored), at_token)  # type: ignore[arg-type]
        )
        top = best(self.scored)
        if top and top.speedup and (not self.curve or top.speedup > self.curve[-1][1]):
            self.curve.append((self.now, top.speedup))
        if self.observe and source == "fork":
            self.observe(self.submitted[answer.hash], answer.speedup or 0.0, answer.tokens)
        return self.met()

    def own(self) -> Scored | None:
        """The verdict on the base's own answer; a fork may have written the same."""
        return next((one for one in self.scored if one.hash == self.recording.final.hash), None)

    def winner(self) -> Scored | None:
        """What would replace the base's own answer as things stand: one without a verdict only yields to a kernel that
        is known to be faster than the reference."""
        own, top = self.own(), best(self.scored)
        return None if top is own or top is None or (own is None and (top.speedup or 0.0) <= 1.0) else top

    def late_until(self, since: float) -> float:
        """When candidates without a verdict are given up. since: the time at which the base had answered."""
        own = self.own()
        right = own is not None and own.status is Status.CORRECT
        return self.now + late_s(self.machine.grace_s, self.now - since, self.now, own_right=right)

    def compete(self) -> None:
        """The base has answered: its forks stop, and verdicts are awaited as the live session awaits them."""
        since, final = self.now, self.recording.final
        for fork in self.active:
            if self.observe:
                self.observe(fork.view, 0.0, max(1, round(self.work - fork.began_at)))
        self.active.clear()
        if final.hash not in self.submitted:
            self.evaluators.submit(self.now, final, "base")
        until, given_up = self.late_until(since), False
        while self.evaluators.running:
            if self.evaluators.next_time() > until:
                self.now = until
                if given_up or self.own() is not None:
                    return
                self.evaluators.keep(self.now, final.hash)
                more_s = own_grace_s(self.machine.grace_s, replaceable=self.winner() is not None)
                until, given_up = self.now + more_s, True
                continue
            self.now = max(self.now, self.evaluators.next_time())
            if done := self.evaluators.complete():
                self.verdict(*done)
                until = self.late_until(since) if done[0].hash == final.hash else until

    def outcome(self, decided: Decision | None) -> Outcome:
        """Of the ended search. decided: by the criterion, None when the base had answered."""
        own, accepted = self.own(), self.winner()
        if accepted is None and own is not None and own.status is Status.CORRECT:
            accepted = own
        if decided is not None:
            accepted = next(one for one in self.scored if one.hash == decided.hash)
        return Outcome(
            self.now,
            "criterion" if decided else "reasoning",
            accepted,
            self.forks,
            round(self.fork_tokens),
            len(self.scored),
            round(min(self.base, self.recording.tokens + self.recording.final.tokens)),
            tuple(self.curve),
            sum(one.status is Status.CORRECT for one in self.scored),
        )

    def met(self) -> bool:
        return self.criterion.decide(self.scored, self.progress()) is not None

    def progress(self) -> Progress:
        reasoning = min(round(self.base), self.recording.tokens)
        return Progress(self.now, reasoning, reasoning + round(self.fork_tokens), self.evaluator_s)


def run_search(
    recording: Recording,
    machine: Machine,
    criterion: Criterion,
    points: Sequence[int],
    admit: Admit = _always,
    observe: Observe | None = None,
) -> Outcome:
    """Play one search until its criterion holds, or the base has answered and late candidates have had their time.

    points: reasoning tokens at which the policy's trigger fires; admit decides there whether a fork is made; observe is
    told of each fork's end: what was known when it was made, the speed-up of its candidate (0 when it gave none, a
    known or a failing one) and its tokens.
    """
    search = _Search(recording, machine, criterion, observe)
    reasoning, whole = recording.tokens, recording.tokens + recording.final.tokens
    asks = set(range(0, reasoning, ASK_TOKENS)) if watches_progress(criterion) else set()
    forks = {point for point in points if point <= reasoning}
    stops = [*sorted(forks | asks), whole]
    at = 0
    while True:
        rate = search.rate()
        to_stop = (stops[at] - search.base) / rate
        to_fork = min((fork.ends_at - search.work for fork in search.active), default=math.inf) / rate
        to_verdict = search.evaluators.next_time() - search.now
        step = max(0.0, min(to_stop, to_fork, to_verdict))
        search.advance(step)
        if to_verdict <= step:
            done = search.evaluators.complete()
            if done and search.verdict(*done):
                break
        elif to_fork <= step:
            search.finish_forks()
        elif at == len(stops) - 1:
            search.compete()
            return search.outcome(None)
        else:
            if stops[at] in asks and search.met():
                break
            if stops[at] in forks:
                search.fork(stops[at], admit)
            at += 1
    return search.outcome(criterion.decide(search.scored, search.progress()))


def sequential(recording: Recording, machine: Machine) -> Outcome:
    """Reason to the end, answer, evaluate: no fork at all."""
    return run_search(recording, machine, Never(), ())


def oracle_seconds(recording: Recording, machine: Machine, criterion: Criterion) -> float | None:
    """Time with only the forks that the criterion needs, each at its mark and evaluated at once.

    None when it never holds before the reasoning's end. Known only afterwards. For a target it is the first recorded
    fork that meets it. The base is not slowed, and no verdict waits for another.
    """
    rate, ready = machine.tokens_per_s, []
    for order, (mark, answer) in enumerate(zip(recording.marks, recording.forks, strict=True)):
        verdict_s = (mark + answer.tokens) / rate + machine.prefill_s + answer.compile_s + answer.gpu_s
        ready.append((verdict_s, order, mark, answer))
    ready.sort()
    scored: list[Scored] = []
    evaluator_s, fork_tokens = 0.0, 0
    for at, (verdict_s, _, mark, answer) in enumerate(ready):
        scored.append(Scored(answer.hash, answer.status, answer.speedup, "fork", len(scored), mark))
        evaluator_s += answer.compile_s + answer.gpu_s
        fork_tokens += answer.tokens
        until = ready[at + 1][0] if at + 1 < len(ready) else recording.tokens / rate
        steps = [verdict_s]
        while watches_progress(criterion) and steps[-1] + ASK_TOKENS / rate < until:
            steps.append(steps[-1] + ASK_TOKENS / rate)
        for now in steps:
            reasoned = min(round(now * rate), recording.tokens)
            if criterion.decide(scored, Progress(now, reasoned, reasoned + fork_tokens, evaluator_s)):
                return now
    return None

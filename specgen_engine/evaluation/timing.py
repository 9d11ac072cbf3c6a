"""From rounds of times of both sides to a speed-up with its interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

RUN_TO_RUN = 0.01
"""Half width of an interval that rounds without scatter have. Kernels whose time is the GPU's came out within 1 % in
two harnesses on one H200 (30 of 44); replayed as CUDA graphs, twice in one harness, they varied by 0.4 %."""
HOST_RUN_TO_RUN = 0.6
"""The same, where the GPU waits for the host in most calls of a side: 1.96 standard deviations of log speed-ups between
two runs on one H200, of the 19 kernels whose reference launches for milliseconds or waits within a call."""
BEHIND = 0.5
SHARED = 1.0
"""Variance between runs that more rounds don't average out, in variances between rounds. (Variance between runs /
variance between rounds) - 1 / rounds was 0.73 (standard error 0.18) over 18 kernels, each in 6 runs on a loaded CPU."""
MIN_ROUNDS, LEAST_ROUNDS = 5, 3
"""With time left, and when the budget is spent."""
LEFT_OUT = 0.25
"""Of a run's rounds, at most so many are left out because the host came late in them alone."""
UNSURE = 0.1
"""A speed-up that may be so much higher is told with a warning."""
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 1.96)
"""Student's t for a 95 % interval, by degrees of freedom from 1; the last one for more."""
FRESH_FACTOR = 2.5
FRESH_SLACK_NS = 300_000
LATE_SLACK_NS = 30_000


class Round(NamedTuple):
    """A block of calls of either side, one after the other, at one place in memory each; ns, none empty."""

    reference: Sequence[int]
    candidate: Sequence[int]

    @property
    def log_ratio(self) -> float:
        return math.log(median(self.reference) / median(self.candidate))


class Speedup(NamedTuple):
    """Medians in milliseconds; low and high bound speedup's 95 % interval over runs."""

    speedup: float
    low: float
    high: float
    reference_ms: float
    candidate_ms: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2 / self.speedup

    @property
    def known_within(self) -> float:
        """By what share the speed-up may be higher: 0.8 where 2 may be 3.6."""
        return self.high / self.speedup - 1


def speedup(rounds: Sequence[Round], floor: float = RUN_TO_RUN) -> Speedup:
    """Ratio of medians over all rounds. Raises ValueError without rounds or with a time that is not positive.

    floor: see half_interval.
    """
    reference = [ns for one in rounds for ns in one.reference]
    candidate = [ns for one in rounds for ns in one.candidate]
    if not reference or not candidate or min(*reference, *candidate) <= 0:
        raise ValueError("a speed-up needs positive times of both sides")
    reference_ms, candidate_ms = median(reference) / 1e6, median(candidate) / 1e6
    ratio = reference_ms / candidate_ms
    factor = math.exp(half_interval([one.log_ratio for one in rounds], math.log(ratio), floor))
    return Speedup(ratio, ratio / factor, ratio * factor, reference_ms, candidate_ms)


def half_interval(log_ratios: Sequence[float], centre: float, floor: float = RUN_TO_RUN) -> float:
    """Half width of the 95 % interval around centre, in logarithms, from the scatter of rounds; infinite from one.

    Calls within a round are not independent (clocks, caches, neighbours and addresses last longer than a call), so they
    say nothing of the interval. A round is one draw of an address and of a moment; what a run's have in common, another
    run lacks: with SHARED = 1 this is the prediction interval of one more round.
    floor: what a second run differs by anyway, in quadrature.
    """
    count = len(log_ratios)
    if count < 2:
        return math.inf
    scatter = math.sqrt(sum((one - centre) ** 2 for one in log_ratios) / (count - 1))
    t = T_95[min(count - 1, len(T_95)) - 1]
    return math.hypot(t * scatter * math.sqrt(1 / count + SHARED), floor)


def floor_of(behind: Sequence[tuple[float, float]]) -> float:
    """behind: of each round, the shares of the reference's and the candidate's calls in which the host came late."""
    sides = [median(side) for side in zip(*behind, strict=True)]
    return HOST_RUN_TO_RUN if max(sides, default=0.0) > BEHIND else RUN_TO_RUN


def undisturbed(rounds: Sequence[Round], behind: Sequence[tuple[float, float]]) -> Sequence[Round]:
    """Without the few rounds in which the host came late, where it does not otherwise: those are no time of a kernel.

    All of them where fewer than MIN_ROUNDS, or too few, would be left. behind: see floor_of.
    """
    kept = [one for one, sides in zip(rounds, behind, strict=True) if max(sides) <= BEHIND]
    enough = len(kept) >= MIN_ROUNDS and len(rounds) - len(kept) <= LEFT_OUT * len(rounds)
    return kept if enough else rounds


def warning(result: Speedup, behind: dict[str, float], cpu_wait: dict[str, float]) -> str:
    """What a user must know of a wide interval, "" of a small one.

    behind: of either side, the share of calls in which the host came late. cpu_wait: of either side, the share of the
    time in which its process wanted a CPU and had none; a side that is not known is not in it.
    """
    if result.known_within <= UNSURE:
        return ""
    told = f"known within {result.known_within:.0%} only"
    late = [side for side, share in behind.items() if share > BEHIND]
    if not late:
        return f"{told}: its rounds differ"
    found = f"{told}: the GPU waits for the host in the calls of the {' and the '.join(late)}"
    waits = [f"{cpu_wait[side]:.0%}" for side in late if side in cpu_wait]
    return f"{found} ({' and '.join(waits)} of the time spent waiting for a CPU)" if waits else found


def is_enough(result: Speedup, rounds: int, precision: float, *, over: bool) -> bool:
    """No further round: the interval is small, or the budget is over."""
    return (rounds >= MIN_ROUNDS and result.half_width <= precision) or (rounds >= LEAST_ROUNDS and over)


def works_on(late_ns: list[int], reference_late_ns: list[int], told_ns: list[int]) -> bool:
    """True when a device goes on working, after the timed stream is done, longer than a wait for it costs.

    What the wait itself costs is the reference's lateness. A tenth of the told time is left for a tail.
    """
    if not late_ns or not told_ns:
        return False
    wait = median(reference_late_ns) if reference_late_ns else 0.0
    return median(late_ns) > wait + LATE_SLACK_NS + 0.1 * median(told_ns)


def skips_repeats(fresh_ns: list[int], repeat_ns: list[int]) -> bool:
    """True when every call on contents not seen before took far longer than the calls on contents seen before.

    The smallest fresh time is compared, so that one call disturbed by other load never condemns a kernel.
    """
    if len(fresh_ns) < 2 or not repeat_ns:
        return False
    return min(fresh_ns) > FRESH_FACTOR * median(repeat_ns) + FRESH_SLACK_NS

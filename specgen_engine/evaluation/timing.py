"""From two lists of times to a speed-up with its interval. Pure functions."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
RUN_TO_RUN = 0.01
"""What no bootstrap of one run sees: another process has its memory elsewhere. Kernels whose time is the GPU's came out
within 1 % in two harnesses on one H200 (30 of 44; the others differ by clocks, tuning or the host)."""
FRESH_FACTOR = 2.5
FRESH_SLACK_NS = 300_000
LATE_SLACK_NS = 30_000


class Speedup(NamedTuple):
    """Medians in milliseconds; low and high bound speedup's 95 % bootstrap interval."""

    speedup: float
    low: float
    high: float
    reference_ms: float
    candidate_ms: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2 / self.speedup


def speedup(reference_ns: list[int], candidate_ns: list[int], seed: int = 0) -> Speedup:
    """Ratio of medians with a percentile bootstrap. Raises ValueError on an empty or non-positive list.

    The resamples' medians are drawn directly: the k-th smallest of n uniform draws is Beta(k, n + 1 - k), so no
    resample is made (3 ms of resampling a block were part of the harness's overhead).
    """
    if not reference_ns or not candidate_ns or min(*reference_ns, *candidate_ns, 1) <= 0:
        raise ValueError("a speed-up needs positive times of both sides")
    rng = np.random.default_rng(seed)
    ref, cand = np.asarray(reference_ns, float), np.asarray(candidate_ns, float)
    medians = [_bootstrap_medians(np.sort(times), rng) for times in (ref, cand)]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    ratio = float(np.median(ref) / np.median(cand))
    return Speedup(
        ratio,
        min(float(low), ratio),
        max(float(high), ratio),
        float(np.median(ref)) / 1e6,
        float(np.median(cand)) / 1e6,
    )


def stated(measured: Speedup) -> Speedup:
    """With the interval that is told: the bootstrap's, and on either side what a second run differs by."""
    ratio = measured.speedup
    low, high = (
        ratio * (1 + side * math.hypot((bound - ratio) / ratio, RUN_TO_RUN))
        for side, bound in ((-1, measured.low), (1, measured.high))
    )
    return measured._replace(low=low, high=high)


def _bootstrap_medians(ordered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES resamples, with replacement, of ordered times."""
    count = ordered.size
    ranks = [(count + 1) // 2, count // 2 + 1]  # the same one where count is odd
    lower = rng.beta(ranks[0], count + 1 - ranks[0], RESAMPLES)
    upper = lower if ranks[0] == ranks[1] else 1 - (1 - lower) * rng.beta(count - ranks[0], 1, RESAMPLES)
    low, high = ((count * draws).astype(int).clip(0, count - 1) for draws in (lower, upper))
    return (ordered[low] + ordered[high]) / 2


def works_on(late_ns: list[int], reference_late_ns: list[int], told_ns: list[int]) -> bool:
    """True when a device goes on working, after the timed stream is done, longer than a wait for it costs.

    What the wait itself costs is the reference's lateness. A tenth of the told time is left for a tail.
    """
    if not late_ns or not told_ns:
        return False
    wait = float(np.median(reference_late_ns)) if reference_late_ns else 0.0
    return float(np.median(late_ns)) > wait + LATE_SLACK_NS + 0.1 * float(np.median(told_ns))


def skips_repeats(fresh_ns: list[int], repeat_ns: list[int]) -> bool:
    """True when every call on contents not seen before took far longer than the calls on contents seen before.

    The smallest fresh time is compared, so that one call disturbed by other load never condemns a kernel.
    """
    if len(fresh_ns) < 2 or not repeat_ns:
        return False
    return min(fresh_ns) > FRESH_FACTOR * float(np.median(repeat_ns)) + FRESH_SLACK_NS

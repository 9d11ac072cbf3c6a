"""From two lists of times to a speed-up with its interval. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 300
FRESH_FACTOR = 2.5
FRESH_SLACK_NS = 300_000


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
    """Ratio of medians with a percentile bootstrap. Raises ValueError on an empty or non-positive list."""
    if not reference_ns or not candidate_ns or min(*reference_ns, *candidate_ns, 1) <= 0:
        raise ValueError("a speed-up needs positive times of both sides")
    rng = np.random.default_rng(seed)
    ref, cand = np.asarray(reference_ns, float), np.asarray(candidate_ns, float)
    medians = [np.median(rng.choice(times, (RESAMPLES, times.size)), axis=1) for times in (ref, cand)]
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    ratio = float(np.median(ref) / np.median(cand))
    return Speedup(
        ratio,
        min(float(low), ratio),
        max(float(high), ratio),
        float(np.median(ref)) / 1e6,
        float(np.median(cand)) / 1e6,
    )


def skips_repeats(fresh_ns: list[int], repeat_ns: list[int]) -> bool:
    """True when every call on contents not seen before took far longer than the calls on contents seen before.

    The smallest fresh time is compared, so that one call disturbed by other load never condemns a kernel.
    """
    if len(fresh_ns) < 2 or not repeat_ns:
        return False
    return min(fresh_ns) > FRESH_FACTOR * float(np.median(repeat_ns)) + FRESH_SLACK_NS

"""From two lists of times to a speed-up with its interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
RUN_TO_RUN = 0.01
HOST_RUN_TO_RUN = 0.64
"""What no repeats within one run see, as half a 95 % interval. Between two runs on one H200, 26 kernels' times as
CUDA graphs varied by 0.4 % (root mean square of coefficients of variation): 1 % holds 1.96 of that. Where the GPU waits
for the host, whose load is others', 30 references' varied by 33 %: 0.64."""
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571)
"""Student's t for a 95 % interval, by degrees of freedom from 1."""
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


def between(ratios: Sequence[float], places: int) -> float:
    """Half width of the 95 % t-interval of blocks' log ratios, by the place in memory that each block had.

    Blocks had the places by turns. 0 with fewer than two: then nothing is known of it.
    """
    logs = [math.log(ratio) for ratio in ratios]
    means = [float(np.mean(logs[place::places])) for place in range(min(places, len(logs)))]
    if len(means) < 2:
        return 0.0
    t = T_95[min(len(means) - 1, len(T_95)) - 1]
    return t * float(np.std(means, ddof=1)) / math.sqrt(len(means))


def stated(measured: Speedup, between_places: float, floor: float = RUN_TO_RUN) -> Speedup:
    """With the interval that is told: calls' or places' scatter, the wider one, and what a second run differs by."""
    ratio = measured.speedup
    below = max(math.log(ratio / measured.low), between_places)
    above = max(math.log(measured.high / ratio), between_places)
    low, high = ratio * math.exp(-math.hypot(below, floor)), ratio * math.exp(math.hypot(above, floor))
    return measured._replace(low=low, high=high)


def _bootstrap_medians(ordered: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES resamples, with replacement, of ordered times."""
    count = ordered.size
    ranks = [(count + 1) // 2, count // 2 + 1]  # the same one where count is odd
    lower = rng.beta(ranks[0], count + 1 - ranks[0], RESAMPLES)
    upper = lower if ranks[0] == ranks[1] else 1 - (1 - lower) * rng.beta(count - ranks[0], 1, RESAMPLES)
    low, high = ((count * draws).astype(int).clip(0, count - 1) for draws in (lower, upper))
    return (ordered[low] + ordered[high]) / 2


def skips_repeats(fresh_ns: list[int], repeat_ns: list[int]) -> bool:
    """True when every call on contents not seen before took far longer than the calls on contents seen before.

    The smallest fresh time is compared, so that one call disturbed by other load never condemns a kernel.
    """
    if len(fresh_ns) < 2 or not repeat_ns:
        return False
    return min(fresh_ns) > FRESH_FACTOR * float(np.median(repeat_ns)) + FRESH_SLACK_NS

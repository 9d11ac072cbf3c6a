"""How far computations of the same inputs are apart, input by input, for bench.models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.models_client import Generated

TOLERANCE = 1e-2


def agreement(
    first: Sequence[Generated], second: Sequence[Generated], inputs: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How far two computations of the same inputs are apart in their first token.

    `away`: each input's, in their order. `outside`: the lengths of those too far apart. GLM-5 attends to 2,048 tokens
    and chooses them in longer inputs only.
    """
    away = [distance(a, b) for a, b in zip(first, second, strict=True)]
    return {
        "inputs": len(away),
        "first_token_equal": sum(a.ids[0] == b.ids[0] for a, b in zip(first, second, strict=True)),
        "logprob_within": sum(one <= TOLERANCE for one in away),
        "logprob_max": max(away),
        "logprob_median": statistics.median(away),
        "outside": sorted(len(ids) for ids, one in zip(inputs, away, strict=True) if one > TOLERANCE),
        "away": [round(one, 7) for one in away],
    }


def distance(a: Generated, b: Generated) -> float:
    """How far b's logprob of a's first token is from a's; the least that b lists where it lists no such token."""
    least = min(b.first.values()) if b.first else float("-inf")
    return abs(a.logprobs[0] - b.first.get(a.ids[0], least))


def agreed(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def paired(forks: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two agreements over the same forks: inputs that are outside in one alone, and how likely so uneven a split is
    where neither is worse (McNemar's exact test, two-sided)."""
    pairs = [(a > TOLERANCE, b > TOLERANCE) for a, b in zip(forks["away"], other["away"], strict=True)]
    mine, theirs = pairs.count((True, False)), pairs.count((False, True))
    return {"forks_only": mine, "other_only": theirs, "both": pairs.count((True, True)), "p": even_split(mine, theirs)}


def even_split(a: int, b: int) -> float:
    """The chance of a split of a + b as uneven as this or more, where each falls to either side alike."""
    tail = sum(math.comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b)
    return min(1.0, 2 * tail)


def other_page(ids: Sequence[int], start: int, page: int = 64) -> list[int]:
    """The ids with the page from `start` on in reverse order and each id one more: another page's KV, as it were."""
    return [*ids[:start], *(one + 1 for one in reversed(ids[start : start + page])), *ids[start + page :]]

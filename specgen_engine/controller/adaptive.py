"""The adaptive trigger's policy: how far apart forks should be, learnt online for each family of tasks and model.

Forks cost engine time (they slow the base, and their tokens have a price); waiting costs too, because a kernel that the
reasoning has already reached is found later. With c the cost of a fork and s the rate at which reasoning yields better
kernels, both in tokens of the base, a spacing g loses c / g + s * g / 2 a token, least at g = sqrt(2 c / s): the
same trade-off as between checkpoints (Young, "A first order approximation to the optimum checkpoint interval", 1974).
What all forks of a search may take from its base is bounded beside that: where no fork is good enough, the search then
lasts no longer than the bound allows.

Everything here is a pure function of a ``Family`` and a ``View``; who keeps them decides where they live between runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

SCHEMA = "specgen.adaptive/1"
MIN_GAP, MAX_GAP = 16, 4_000
IMPROVEMENT = 1.05


@dataclass(frozen=True, slots=True)
class Family:
    """What was seen of one family, prior included.

    first, first_tokens: searches that got a correct kernel, and the reasoning tokens that forks covered before it.
    better, better_tokens: improvements of at least 5 % after that, and the tokens covered meanwhile.
    forks, fork_tokens: forks that ended, and their tokens.
    """

    first: float = 1.0
    first_tokens: float = 1_000.0
    better: float = 1.0
    better_tokens: float = 4_000.0
    forks: float = 1.0
    fork_tokens: float = 1_500.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What forks cost, and what they are worth.

    slowdown: share of the base's speed that one fork in flight takes; token_price: what a fork token is worth in base
    tokens beside that; first_weight: worth of the first correct kernel, with later improvements as 1;
    waiting_per_evaluator: queued jobs per evaluator above which no fork is made.
    most_share: of the base's time, that the forks of one search may take; start_tokens: of reasoning, that count
    towards it before they are there, so that the first kernel is not waited for.
    """

    slowdown: float = 0.01
    token_price: float = 0.01
    first_weight: float = 20.0
    waiting_per_evaluator: float = 2.0
    most_share: float = 0.025
    start_tokens: int = 1_000


class View(NamedTuple):
    """What is known of a search where it could fork.

    gap: reasoning tokens since the last fork, or the start; best: speed-up of the fastest correct kernel, 0 without;
    position: reasoning tokens; forks, fork_tokens: so far, those in flight included; in_flight: forks still running.
    """

    gap: int
    best: float
    position: int
    forks: int = 0
    fork_tokens: int = 0
    in_flight: int = 0


def spacing(family: Family, has_correct: bool, costs: Costs) -> float:
    """Reasoning tokens that should lie between two forks now; between MIN_GAP and MAX_GAP."""
    cost = (costs.slowdown + costs.token_price) * family.fork_tokens / family.forks
    if has_correct:
        rate = family.better / family.better_tokens
    else:
        rate = costs.first_weight * family.first / family.first_tokens
    return min(max(math.sqrt(2.0 * cost / rate), MIN_GAP), MAX_GAP)


def expected_tokens(family: Family, view: View) -> float:
    """Of the next fork: the family's mean, or this search's own where its answers are longer (they grow)."""
    mean = family.fork_tokens / family.forks
    return max(mean, (2.0 * mean + view.fork_tokens) / (2.0 + view.forks))


def affordable(family: Family, view: View, costs: Costs) -> bool:
    """Whether one more fork keeps what forks take within the bound; those in flight are half done on average."""
    tokens = view.fork_tokens + (1.0 + 0.5 * view.in_flight) * expected_tokens(family, view)
    return costs.slowdown * tokens <= costs.most_share * (view.position + costs.start_tokens)


def wants_fork(family: Family, view: View, waiting: int, evaluators: int, costs: Costs) -> bool:
    """Whether to fork here. waiting: jobs queued for evaluators."""
    if waiting > costs.waiting_per_evaluator * evaluators:
        return False
    return view.gap >= spacing(family, view.best > 0.0, costs) and affordable(family, view, costs)


def observed(family: Family, gap: int, best_before: float, speedup: float, fork_tokens: int) -> Family:
    """Family after one fork ended.

    gap: tokens since the fork before it; best_before: speed-up of the best correct kernel when it was made, 0 without
    one; speedup: of its candidate, 0 when it gave none, a known one or a failing one.
    """
    family = replace(family, forks=family.forks + 1, fork_tokens=family.fork_tokens + fork_tokens)
    if best_before > 0.0:
        won = float(speedup >= best_before * IMPROVEMENT)
        return replace(family, better=family.better + won, better_tokens=family.better_tokens + gap)
    return replace(family, first=family.first + float(speedup > 0.0), first_tokens=family.first_tokens + gap)


def dumps(families: Mapping[str, Family]) -> str:
    """The state of every family as JSON, for keeping between runs."""
    return json.dumps({"schema": SCHEMA, "families": {name: asdict(one) for name, one in families.items()}})


def loads(text: str, source: str = "adaptive state") -> dict[str, Family]:
    """Inverse of ``dumps``. Raises ValueError naming the source and the remedy."""
    names = {field.name for field in fields(Family)}
    try:
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r} instead of {SCHEMA!r}")
        families = {}
        for name, row in data["families"].items():
            if set(row) != names or not all(isinstance(value, (int, float)) and value > 0 for value in row.values()):
                raise ValueError(f"family {name!r} needs positive numbers {', '.join(sorted(names))}")
            families[name] = Family(**row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source}: not usable ({error}); delete it to learn afresh") from None
    return families

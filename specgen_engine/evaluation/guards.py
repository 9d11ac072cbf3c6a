"""The guards against cheating that can be switched off one by one, so that tests show what each of them is for.

A worker takes `guards_off` in the message of an evaluation. Tests write such messages; no pool, request or option does.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Guard(StrEnum):
    """What each refuses; tests/exploits/*/expected.json names the one (or ones) that an attack meets."""

    IMPORTS = "imports"  # modules that no kernel needs
    SANDBOX = "sandbox"  # files, network and processes out of reach
    PLAIN = "plain"  # results that are not plain tensors
    ALIAS = "alias"  # results in an input's memory
    MUTATION = "mutation"  # inputs that a call changes
    OVERWRITE = "overwrite"  # a result that the next call changes
    VALUES = "values"  # results that differ from the reference's
    SEEDS = "seeds"  # inputs that a candidate can foresee
    TIMED_RESULTS = "timed_results"  # wrong results in timed calls
    HIDDEN = "hidden"  # wrong results after timing
    UNSEEN = "unseen"  # speed on remembered contents only
    OUTSIDE_CLOCK = "outside_clock"  # less time reported than passed
    IDLE = "idle"  # waiting while others work
    STREAMS = "streams"  # GPU work outside the timed stream
    L2 = "l2"  # data kept in the L2 cache between timed calls
    FLOOR = "floor"  # times that the device could not have moved the bytes in
    PATCHES = "patches"  # functions of torch, time or the harness replaced


def parse_guards(names: Iterable[object]) -> frozenset[Guard]:
    """Raises ValueError naming a guard that does not exist."""
    return frozenset(Guard(str(name)) for name in names)

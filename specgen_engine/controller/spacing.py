"""How far apart a trigger's firings are kept: what may stand behind it, as in ``paragraph:min=800:new=code``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PATIENCE = 3
"""Times ``min`` after which new=code is waived: a model that reasons in prose is forked all the same, more rarely."""


class Spacing(NamedTuple):
    """least: tokens since the firing before, or since the reasoning's start.

    code: nor is there a firing before a code fence has closed since then, or PATIENCE * least tokens have passed.
    """

    least: int = 0
    code: bool = False

    def allows(self, distance: int, code_closed: bool) -> bool:
        """distance: tokens, and code_closed: whether a code fence has closed, since the firing before."""
        if distance < self.least:
            return False
        return code_closed or not self.code or distance >= PATIENCE * self.least


def parse_spacing(parts: Sequence[str]) -> tuple[list[str], Spacing]:
    """A trigger's parts between colons, without those behind it that say how far apart firings are, and what they say.

    Raises ValueError with the remedy.
    """
    rest, least, code = list(parts), 0, False
    while rest and rest[-1].partition("=")[:2] in (("min", "="), ("new", "=")):
        name, _, value = rest.pop().partition("=")
        if name == "new":
            if value != "code" or code:
                raise ValueError("new= is given once and needs code, as in paragraph:min=800:new=code")
            code = True
            continue
        if least or not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 10_000_000:
            raise ValueError(
                "min= is given once and needs a whole number of tokens from 1 to 10000000, as in paragraph:min=200"
            )
        least = int(value)
    if code and not least:
        raise ValueError("new=code needs min=N beside it, as in paragraph:min=800:new=code")
    return rest, Spacing(least, code)

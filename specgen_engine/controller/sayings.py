"""What the forks of one search have said so far, as token ids: who follows whom word by word."""

from __future__ import annotations

from collections.abc import Sequence

from specgen_engine.controller.repeats import agreement


class Sayings:
    """By number of the fork, in the order in which they were made."""

    def __init__(self) -> None:
        self._ids: dict[int, Sequence[int]] = {}
        self._let_go: set[int] = set()

    def hear(self, fork: int, ids: Sequence[int]) -> None:
        """All that it has said. An abort comes without ids, and what left is not taken back."""
        if ids:
            self._ids[fork] = ids

    def leave(self, fork: int) -> None:
        """It was cut off: nothing is compared with it any more."""
        self._ids.pop(fork, None)

    def let_go(self, fork: int) -> None:
        """It may end as it likes, whomever it follows."""
        self._let_go.add(fork)

    def tokens(self, fork: int) -> int:
        return len(self._ids[fork])

    def followed(self, fork: int) -> int | None:
        """The first earlier fork that has said all this one has said, and more."""
        mine = self._ids.get(fork, ())
        if not mine or fork in self._let_go:
            return None
        ahead = (other for other in sorted(self._ids) if other < fork and self.tokens(other) > len(mine))
        return next((other for other in ahead if agreement(mine, self._ids[other]) == len(mine)), None)

    def agreed(self, fork: int) -> int | None:
        """Tokens that it began with like an earlier one, the most of any; None without an earlier one."""
        mine = self._ids.get(fork, ())
        return max((agreement(mine, ids) for other, ids in self._ids.items() if other < fork), default=None)

"""One block of timed calls as three clocks saw it: the processes' own, the supervisor's, the wall. Pure functions."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from .timing import LATE_SLACK_NS

IDLE_FACTOR, IDLE_SLACK_NS = 3, 10_000_000
"""Wall time beyond the reference's own share of waiting, at which CPU time is no measure of a candidate's work."""
UNSEEN_FACTOR = 0.5
HEAD_STARTS = (0, 100_000, 400_000, 1_600_000)
"""Cycles of the GPU before a call, about 0, 0.05, 0.2 and 0.8 ms."""
BEHIND = 0.5


class Side(NamedTuple):
    """One process's calls of a block. told: its own times; spent, wall: the supervisor's clock and the wall clock
    around all of them; late: see clock.take_late; behind: calls that began before the host had launched all of them."""

    told: list[int]
    spent: int
    wall: int
    late: list[int]
    behind: int

    @property
    def around(self) -> int:
        """What the supervisor's clock saw beyond the calls: the harness's own work, or what was not told."""
        return self.spent - sum(self.told)

    @property
    def is_behind(self) -> bool:
        """The host was, in most calls."""
        return self.behind > BEHIND * len(self.told)


class Block(NamedTuple):
    reference: Side
    candidate: Side

    @property
    def ratio(self) -> float:
        return median(self.reference.told) / median(self.candidate.told)

    @property
    def goes_on(self) -> bool:
        """The device went on, after the timed stream was done, for longer than a wait for it costs.

        What the wait itself costs is the reference's lateness. A tenth of the told time is left for a tail.
        """
        late, told = self.candidate.late, self.candidate.told
        if not late:
            return False
        wait = median(self.reference.late) if self.reference.late else 0.0
        return median(late) > wait + LATE_SLACK_NS + 0.1 * median(told)

    @property
    def idle(self) -> bool:
        """The candidate's CPU clock stood still for far more of the wall's time than the reference's."""
        mine, other = self.candidate, self.reference
        return (mine.wall - IDLE_SLACK_NS) * other.spent > IDLE_FACTOR * mine.spent * other.wall


def hiding(blocks: list[Block], slack_ns: int, call_slack_ns: int) -> list[bool]:
    """For each block: did the candidate tell clearly less than passed?

    Measured against what the harness takes around a call of the reference, the median of all blocks: a load on the
    host that comes and goes disturbs some of them.
    """
    usual = median(block.reference.around / len(block.reference.told) for block in blocks)
    found = []
    for block in blocks:
        calls, told = len(block.candidate.told), sum(block.candidate.told)
        extra = block.candidate.around - usual * calls
        found.append(extra - UNSEEN_FACTOR * told > slack_ns + call_slack_ns * calls)
    return found


def share_behind(sides: list[Side]) -> float:
    """Of calls, those that began before the host had launched all of them."""
    return round(sum(side.behind for side in sides) / sum(len(side.told) for side in sides), 3)


def next_head_start(block: Block, head_start: int) -> int | None:
    """A longer one while the host is behind on either side and one is left; None: this one does."""
    longer = [one for one in HEAD_STARTS if one > head_start]
    return longer[0] if longer and (block.reference.is_behind or block.candidate.is_behind) else None


def least_that_does(tried: dict[int, Block]) -> int:
    """Of the head starts tried, the least with which fewest sides are behind: who waits for the device in each call, or
    launches without end, always is."""
    return min(tried, key=lambda one: (tried[one].reference.is_behind + tried[one].candidate.is_behind, one))

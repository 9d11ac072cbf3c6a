"""A serving engine on an evaluator's device stands still while a candidate is timed there.

Two lock files a device, all flock, so that the kernel frees what a dead process held. `engine` is held shared by every
engine with a batch in flight; `asks` is held shared by every timed run, from when it wants the device still until it is
over. Both sides take their own first and look at the other's then, so that one of them always sees the other. A look
is a try for an exclusive hold: two system calls, about 2 us, at every step of the engine.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .gpulock import RETRY_S, lock_file

LOOK_S = 0.0005
LONGEST_PAUSE_S = 3.0  # a timed run takes a second; a hung one must not hang the engine
LONGEST_WAIT_S = 15.0  # for engines that a pause share holds back, or that take no step: then it is timed beside them


def may_pause(ran_s: float, paused_s: float, share: float) -> bool:
    """Whether an engine that has run `ran_s` since a pause of `paused_s` may stand still again.

    share: of the time of a pause and what follows it, the most that may be the pause.
    """
    return ran_s * share >= paused_s * (1 - share)


@dataclass(slots=True)
class Pauses:
    """Since start-up. broken: pauses that ended by LONGEST_PAUSE_S, with a run still being timed."""

    count: int = 0
    seconds: float = 0.0
    broken: int = 0


class EngineTurn:
    """The engine's side, in its scheduler's loop.

    finish: waits until the device has done all that was launched. share: see may_pause.
    """

    def __init__(
        self, device: str, share: float, finish: Callable[[], None],
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.pauses = Pauses()
        self._share, self._finish, self._clock, self._sleep = share, finish, clock, sleep
        self._engine, self._asks = lock_file(device, "engine"), lock_file(device, "asks")
        self._running = False
        self._resumed_at = self._last_pause_s = 0.0

    def step(self) -> None:
        """Before a batch is launched: returns when the engine may run."""
        if self._running:
            ran_s = self._clock() - self._resumed_at
            if not (_is_held(self._asks) and may_pause(ran_s, self._last_pause_s, self._share)):
                return
            self._finish()
            self.idle()
        self._enter()

    def idle(self) -> None:
        """Nothing is in flight on the device."""
        if self._running:
            fcntl.flock(self._engine, fcntl.LOCK_UN)
            self._running = False

    def close(self) -> None:
        for fd in (self._engine, self._asks):
            os.close(fd)

    def _enter(self) -> None:
        start = self._clock()
        while True:
            fcntl.flock(self._engine, fcntl.LOCK_SH)  # held against it only by a look
            asked, waited_s = _is_held(self._asks), self._clock() - start
            if not asked or waited_s >= LONGEST_PAUSE_S:
                break
            fcntl.flock(self._engine, fcntl.LOCK_UN)
            self._sleep(LOOK_S)
        self._running, self._resumed_at = True, self._clock()
        if waited_s >= LOOK_S:
            self._last_pause_s = waited_s
            self.pauses.count += 1
            self.pauses.seconds += waited_s
            self.pauses.broken += asked


@dataclass(slots=True)
class Stillness:
    """waited_s: until every engine stood still, or until LONGEST_WAIT_S. kept: none ran, then or at the end."""

    waited_s: float = 0.0
    kept: bool = True


@contextmanager
def engine_still(
    device: str, between: Callable[[float], None], longest_s: float = LONGEST_WAIT_S
) -> Iterator[Stillness]:
    """The timed run's side. between(seconds) is called while waiting and may raise."""
    stillness, start = Stillness(), time.monotonic()
    engine, asks = lock_file(device, "engine"), lock_file(device, "asks")
    try:
        while not _taken(asks, fcntl.LOCK_SH):  # held against it only by a look
            between(LOOK_S)
        while (runs := _is_held(engine)) and time.monotonic() - start < longest_s:
            between(RETRY_S)
        stillness.waited_s = time.monotonic() - start
        yield stillness
        stillness.kept = not (runs or _is_held(engine))
    finally:
        for fd in (engine, asks):
            os.close(fd)


def _is_held(fd: int) -> bool:
    """Whether another holds it."""
    if not _taken(fd, fcntl.LOCK_EX):
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _taken(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

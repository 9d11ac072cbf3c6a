"""A serving engine on an evaluator's device stands still while a candidate is timed there.

Two lock files a device, all flock, so that the kernel frees what a dead process held. `engine` is held shared by every
engine with a batch in flight; `asks` is held shared by every timed run, from when it wants the device still until it is
over. Both sides take their own first and look at the other's then, so that one of them always sees the other. A look
is a try for an exclusive hold: two system calls, about 2 us, at every step of the engine. An engine that goes on beside
a timed run makes the file `engine` a byte longer, so that the run knows, whatever the engine has done since.
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
    """Whether an engine may stand still `ran_s` seconds, idle ones counted, after a pause of `paused_s` ended.

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
            if not (_is_held(self._asks) and self._may_pause()):
                return
            self._finish()
            self.idle()
        self._enter(LONGEST_PAUSE_S if self._may_pause() else 0.0)

    def idle(self) -> None:
        """Nothing is in flight on the device."""
        if self._running:
            fcntl.flock(self._engine, fcntl.LOCK_UN)
            self._running = False

    def close(self) -> None:
        for fd in (self._engine, self._asks):
            os.close(fd)

    def _may_pause(self) -> bool:
        return may_pause(self._clock() - self._resumed_at, self._last_pause_s, self._share)

    def _enter(self, longest_s: float) -> None:
        start = self._clock()
        while True:
            fcntl.flock(self._engine, fcntl.LOCK_SH)  # held against it only by a look
            asked, waited_s = _is_held(self._asks), self._clock() - start
            if not asked or waited_s >= longest_s:
                break
            fcntl.flock(self._engine, fcntl.LOCK_UN)
            self._sleep(LOOK_S)
        if asked:
            os.ftruncate(self._engine, os.fstat(self._engine).st_size + 1)
        self._running = True
        if waited_s >= LOOK_S:
            self._resumed_at, self._last_pause_s = self._clock(), waited_s
            self.pauses.count += 1
            self.pauses.seconds += waited_s
            self.pauses.broken += asked


@dataclass(slots=True)
class Stillness:
    """waited_s: until every engine stood still, or until LONGEST_WAIT_S. kept, once it is over: none ran meanwhile."""

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
        stillness.waited_s, gone_on = time.monotonic() - start, os.fstat(engine).st_size
        yield stillness
        stillness.kept = not runs and os.fstat(engine).st_size == gone_on
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

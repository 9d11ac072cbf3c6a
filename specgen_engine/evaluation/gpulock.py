"""Turns on one GPU: many may check their candidates side by side, a timed run has the GPU to itself.

Lock files of a GPU, all flock: the kernel frees them when their owner dies. `room` is held shared while checking and
alone while timing; `gate` is held on the way into the room, so that nobody is overtaken for ever; `want` is held shared
by those who wait to time: they go before newcomers, so that what has been started gets finished; `admit` is held while
the GPU's free memory is looked at and promised (gpuroom.py).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RETRY_S = 0.005


class GpuTurn:
    """One evaluation's place on a GPU. between(seconds) is called while waiting and may raise."""

    def __init__(self, device: str, between: Callable[[float], None]) -> None:
        self._between = between
        self._fds = {name: lock_file(device, name) for name in ("room", "gate", "want", "admit")}
        self.is_alone = False

    def share(self) -> float:
        """Enter beside others who don't time; returns the seconds waited."""
        start = time.monotonic()
        self._wait("want", fcntl.LOCK_EX)
        self._free("want")
        self._wait("gate", fcntl.LOCK_EX)
        self._wait("room", fcntl.LOCK_SH)
        self._free("gate")
        return time.monotonic() - start

    def alone(self) -> float:
        """Have the GPU to oneself from now on; returns the seconds waited."""
        if self.is_alone:
            return 0.0
        start = time.monotonic()
        self._wait("want", fcntl.LOCK_SH)
        self._free("room")
        self._wait("gate", fcntl.LOCK_EX)
        self._wait("room", fcntl.LOCK_EX)
        self._free("gate")
        self._free("want")
        self.is_alone = True
        return time.monotonic() - start

    def beside_others(self, between: Callable[[float], None]) -> None:
        """No longer alone: others may check, and none times a kernel until this turn ends."""
        self._between = between
        if self.is_alone:
            self._wait("room", fcntl.LOCK_SH)
            self.is_alone = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Nobody else looks at the GPU's free memory or is promised any."""
        self._wait("admit", fcntl.LOCK_EX)
        try:
            yield
        finally:
            if self._fds:
                self._free("admit")

    def close(self) -> None:
        """Leave; whatever was held is free."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _wait(self, name: str, how: int) -> None:
        while True:
            try:
                fcntl.flock(self._fds[name], how | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._between(RETRY_S)

    def _free(self, name: str) -> None:
        fcntl.flock(self._fds[name], fcntl.LOCK_UN)


@contextmanager
def gpu_turn(device: str, between: Callable[[float], None]) -> Iterator[GpuTurn]:
    """A shared turn. Every pool of this machine's user waits for the same GPU."""
    turn = GpuTurn(device, between)
    try:
        turn.share()
        yield turn
    finally:
        turn.close()


def lock_file(device: str, lock: str) -> int:
    """An open descriptor of a device's lock file, the same file for all processes of this user; device: cpu, cuda:N."""
    return os.open(lock_path(device, lock), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def lock_path(device: str, lock: str) -> Path:
    """Where that file lies; gpuroom.py keeps others beside it."""
    name = "cpu" if device == "cpu" else f"gpu-{name_of_gpu(device)}"
    return Path(tempfile.gettempdir()) / f"specgen-{name}-{os.getuid()}.{lock}"


def name_of_gpu(device: str) -> str:
    """As the driver knows cuda:N, which counts what CUDA_VISIBLE_DEVICES leaves: an index or a UUID."""
    index = device.partition(":")[2] or "0"
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[int(index)] if int(index) < len(visible) else index

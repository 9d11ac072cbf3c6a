"""One GPU, one evaluation at a time: a timed run must have its GPU to itself."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RETRY_S = 0.01


@contextmanager
def gpu_turn(device: str, between: Callable[[float], None]) -> Iterator[float]:
    """Hold the device's lock; yields the seconds waited. Every pool of this machine's user waits for the same one.

    between(seconds) is called while waiting and may raise. flock: the kernel frees it when its owner dies.
    """
    index = device.partition(":")[2] or "0"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    name = visible.split(",")[int(index)].strip() if visible and int(index) < len(visible.split(",")) else index
    path = Path(tempfile.gettempdir()) / f"specgen-gpu-{name}-{os.getuid()}.lock"
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    start = time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                between(RETRY_S)
        yield time.monotonic() - start
    finally:
        os.close(fd)

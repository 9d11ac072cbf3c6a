"""What evaluations on one GPU tell each other of its memory: bytes that they reckon with, and that it is short.

A promise is a file whose owner holds its flock: it counts as long as the owner lives. All are made and read within the
lock `admit` of gpulock.py, so that no two evaluations reckon with the same bytes. Shortage is a file's age: workers end
then what they keep on the GPU for later. Six workers with a judge for each of three tasks held 20 GiB of an H200 in
contexts and weights while a seventh of that was missing to time a candidate (2026-11-30).
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from .gpulock import lock_file, lock_path

SHORT, PROMISE = "short", "promise-"
REFUSED = ("out of memory", "out_of_memory", "alloc_failed", "cudaerrormemoryallocation")
"""In what PyTorch, Triton, the driver and CUDA's libraries say when there is none left."""
OWN_CAP = "out of memory: it holds more than"
"""What the worker says of a candidate beyond its cap on the host: no shortage of the GPU."""


class Promise:
    """`size` bytes of a GPU for one evaluation, until close() or its process's end."""

    def __init__(self, device: str, size: int) -> None:
        self.path = lock_path(device, f"{PROMISE}{os.getpid()}-{secrets.token_hex(4)}")
        self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.write(self._fd, str(size).encode())

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


def promised(device: str) -> int:
    """Bytes that living evaluations reckon with; what is left of dead ones is removed."""
    pattern = lock_path(device, PROMISE)
    return sum(_held(path) for path in pattern.parent.glob(f"{pattern.name}*"))


def _held(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone by now, or nobody's of ours
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = os.pread(fd, 32, 0)
        return int(said) if said.isdigit() else 0
    else:
        path.unlink(missing_ok=True)
        return 0
    finally:
        os.close(fd)


def note_shortage(device: str) -> None:
    """Every worker on this GPU is to end what it keeps there for later."""
    fd = lock_file(device, SHORT)
    try:
        os.utime(fd)
    finally:
        os.close(fd)


def last_shortage(device: str) -> int:
    """When that was last said, in nanoseconds of the file system's clock; 0 where it never was."""
    try:
        return lock_path(device, SHORT).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def is_refused_memory(reason: str) -> bool:
    """Did a GPU's allocator refuse? Then it may have been others' doing."""
    said = reason.lower()
    return OWN_CAP not in reason and any(word in said for word in REFUSED)

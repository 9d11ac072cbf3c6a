"""One build folder a candidate, addressed by its content, so that a second evaluation compiles nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

COMPLETE = "complete"


class BuildFolder:
    """A context: .path is this candidate's folder, held by flock (the kernel frees it when its owner dies).

    A folder whose compile didn't end is emptied first, so no partial object and no lock file outlives its owner.
    When another worker holds the same candidate's folder, a temporary one is used instead.
    """

    def __init__(self, cache: Path, key: str) -> None:
        self.cache, self.key = cache, key
        self.temporary = False

    def __enter__(self) -> BuildFolder:
        self.cache.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.cache / f"{self.key}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.temporary = True
            self.path = Path(tempfile.mkdtemp(prefix=f"{self.key}-", dir=self.cache))
            return self._ready()
        self.path = self.cache / self.key
        if not (self.cache / f"{self.key}.{COMPLETE}").exists():
            shutil.rmtree(self.path, ignore_errors=True)
        return self._ready()

    def _ready(self) -> BuildFolder:
        for name in ("torch", "triton"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        return self

    def keep(self) -> None:
        """The compile came to its end: what is here may be used again."""
        if not self.temporary:
            (self.cache / f"{self.key}.{COMPLETE}").touch()

    def __exit__(self, *_: object) -> None:
        if self.temporary or not (self.cache / f"{self.key}.{COMPLETE}").exists():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

"""Build folders, found again by the candidate's content, so that a second evaluation compiles nothing.

A folder's path never changes: build files name it, and a sandbox is entered before it is known whose folder it will
be. What belongs to which candidate is said by a small file `<hash>.complete`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COMPLETE = "complete"
HANG = "hang"
HANG_DAYS = 1.0
ABANDONED_S = 60.0
NOTE = ".specgen-built"
"""Where builds/bin/ninja notes what it built, folder's name aside."""
MOVED_FILES, MOVED_BYTES = 64, 64 << 20
"""A build that takes more stays where it is."""
_PREFIX = "build-"


class PreparedFolder:
    """An empty build folder, held by flock on itself while its owner lives."""

    def __init__(self, cache: Path) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("torch", "triton"):
            (self.path / name).mkdir()

    def close(self, *, keep: bool) -> None:
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class BuildFolder:
    """A context: .path is this candidate's folder, .hit says that a complete build lies in it.

    Held by flock (the kernel frees it when its owner dies). A folder whose compile didn't end is removed, so no
    partial object and no lock file outlives its owner. When another worker holds the same candidate's folder, a
    temporary one is used instead.
    prepared: gives an empty folder, or None, when there is no complete build; it is this context's from then on.
    A complete build that may lie elsewhere (see movable) is copied into such a folder, too: .moved says so, and a
    process that can write nowhere else may load it.
    """

    def __init__(self, cache: Path, key: str, prepared: Callable[[], PreparedFolder | None] = lambda: None) -> None:
        self.cache, self.key, self._prepared = cache, key, prepared
        self._folder: PreparedFolder | None = None
        self._kept = False

    def __enter__(self) -> BuildFolder:
        self.cache.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.cache / f"{self.key}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self.temporary, complete = False, None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            complete = complete_build(self.cache, self.key)
        except BlockingIOError:
            self.temporary = True
        self.hit = complete is not None
        self.moved = False
        if complete is not None and (files := movable(complete)):
            self._folder = self._prepared()
            if self._folder is not None:
                self.moved = copy_build(files, complete, self._folder.path)
                complete = self._folder.path if self.moved else complete
        if complete is None:
            self._folder = self._prepared() or PreparedFolder(self.cache)
            complete = self._folder.path
        self.path = complete
        for name in ("torch", "triton"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        return self

    def keep(self) -> None:
        """The compile came to its end: what is here may be used again."""
        if self.temporary or self.hit:
            return
        handle, name = tempfile.mkstemp(dir=self.cache, prefix=f".{self.key}-")
        with os.fdopen(handle, "w") as file:
            file.write(self.path.name)
        os.replace(name, self.cache / f"{self.key}.{COMPLETE}")
        self._kept = True

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.close(keep=self._kept)
        os.close(self._lock)


def complete_build(cache: Path, key: str) -> Path | None:
    """The folder with a candidate's complete build, if there is one."""
    try:
        name = (cache / f"{key}.{COMPLETE}").read_text().strip() or key
    except OSError:
        return None
    path = cache / Path(name).name
    return path if path.is_dir() else None


def movable(folder: Path) -> list[Path]:
    """The files of a build of which nothing but C++ libraries is left, each with what they were built from noted.

    Empty where it is none. It was written by foreign code: nothing but plain files counts, and not many.
    """
    try:
        if any((folder / "triton").iterdir()):
            return []
        libraries = list((folder / "torch").iterdir())
        found = [Path(one.path) for library in libraries for one in os.scandir(library) if one.name[-2:] != ".o"]
        known = [os.lstat(path) for path in found]
    except OSError:
        return []
    plain = all(stat.S_ISREG(one.st_mode) for one in known) and not any(path.is_symlink() for path in libraries)
    noted = bool(libraries) and all((library / NOTE) in found for library in libraries)
    small = len(found) <= MOVED_FILES and sum(one.st_size for one in known) <= MOVED_BYTES
    return found if plain and noted and small else []


def copy_build(files: list[Path], source: Path, target: Path) -> bool:
    """Whether all of them lie below target now, as old as they were."""
    try:
        for path in files:
            to = target / path.relative_to(source)
            to.parent.mkdir(exist_ok=True)
            shutil.copy2(path, to, follow_symlinks=False)
    except OSError:
        return False
    return True


def sweep(cache: Path) -> int:
    """Remove folders that no build was kept of and whose owner is gone (a killed worker's); returns how many."""
    kept = {complete_build(cache, path.stem) for path in cache.glob(f"*.{COMPLETE}")}
    return sum(
        _remove_unowned(path) for path in cache.glob(f"{_PREFIX}*") if path not in kept and _age_s(path) >= ABANDONED_S
    )


def forget_builds(cache: Path) -> int:
    """Remove every complete build and every remembered hang; returns how many folders went.

    The cache's own folder and the folders that running workers prepared stay: a worker enters its sandbox with them,
    so without them its next candidate could not be built.
    """
    for path in (*cache.glob(f"*.{COMPLETE}"), *cache.glob(f"*.{HANG}")):
        path.unlink(missing_ok=True)
    return sum(_remove_unowned(path) for path in cache.glob(f"{_PREFIX}*"))


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _remove_unowned(path: Path) -> bool:
    """Whether the folder went: not when it is gone already, or when its owner lives."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def remember_hang(cache: Path, task: str, candidate: str, reason: str) -> None:
    """This candidate's call did not end on this task."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / f"{candidate}-{task}.{HANG}").write_text(reason)


def remembered_hang(cache: Path, task: str, candidate: str) -> str | None:
    """Why this candidate is not to be run again on this task; None when nothing is known, or it is over a day old."""
    path = cache / f"{candidate}-{task}.{HANG}"
    try:
        if time.time() - path.stat().st_mtime > HANG_DAYS * 86400:
            path.unlink(missing_ok=True)
            return None
        return path.read_text()
    except OSError:
        return None

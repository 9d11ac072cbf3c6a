"""Files that a command writes: asked for before any work, written whole or not at all. Standard library only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from specgen_engine.errors import SpecGenError


def require_writable(path: Path, option: str) -> None:
    """Called before any work, so that none is lost. Raises SpecGenError naming the option, its value and the remedy."""
    try:
        if path.is_dir():
            raise SpecGenError(f"{option} {path}: is a folder; name a file")
        if path.exists() and not path.is_file():
            raise SpecGenError(f"{option} {path}: is no regular file; name another")
        if not path.absolute().parent.is_dir():
            raise SpecGenError(f"{option} {path}: its folder does not exist; make it first")
        handle, scratch = _beside(path)
        os.close(handle)
        os.unlink(scratch)
    except OSError as error:
        raise SpecGenError(f"{option} {path}: {error.strerror}; name a file that can be written") from None


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all, and nothing else is left. Raises SpecGenError naming the file."""
    try:
        handle, scratch = _beside(path)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise SpecGenError(f"{path}: not written: {error.strerror}; see that its disk has room") from error


def _beside(path: Path) -> tuple[int, str]:
    """A new file in the same folder: only within one file system is a rename whole."""
    return tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}-")

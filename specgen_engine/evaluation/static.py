"""Checks that read a candidate's text and run none of it."""

from __future__ import annotations

import ast
from typing import NamedTuple

from .base import Status

BANNED_IMPORTS = frozenset({"socket", "subprocess", "multiprocessing", "gc", "inspect", "specgen_engine"})
"""Nothing a kernel needs; each is the first step of a known way to cheat (tests/exploits)."""


class Fault(NamedTuple):
    """Why a text is not run: status rejected or compile_error, and one line."""

    status: Status
    reason: str


def static_check(source: str, source_bytes: int, *, entry: str = "ModelNew") -> Fault | None:
    """Why a text can't be evaluated, or None. Raises nothing, whatever the text."""
    if not source.strip():
        return Fault(Status.COMPILE_ERROR, "the source is empty")
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        return Fault(Status.REJECTED, "the source has characters that are not text (lone surrogates)")
    if size > source_bytes:
        return Fault(Status.REJECTED, f"the source has {size} bytes; at most {source_bytes} are read")
    if any(ord(char) < 32 and char not in "\t\n\r\f" for char in source):
        return Fault(Status.REJECTED, "the source has binary bytes (control characters)")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return Fault(Status.COMPILE_ERROR, f"line {error.lineno}: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        return Fault(Status.COMPILE_ERROR, f"the source can't be parsed: {error or type(error).__name__}")
    banned = _banned(tree)
    if banned:
        return Fault(Status.REJECTED, banned)
    missing = _entry_missing(tree, entry)
    return Fault(Status.COMPILE_ERROR, missing) if missing else None


def _banned(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            if name.split(".")[0] in BANNED_IMPORTS:
                return f"line {node.lineno}: import of {name} is not allowed in a candidate"
    return None


def _entry_missing(tree: ast.Module, entry: str) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == entry:
            return None
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == entry for target in targets):
                return None
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == entry for a in node.names):
            return None
    return f"the source defines no class {entry}"

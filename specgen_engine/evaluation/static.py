"""Checks that read a candidate's text and run none of it."""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

from .base import Status
from .candidates.entry import EntryError, parse_entry
from .candidates.forms import is_cuda_text, python_interface, solution_of
from .candidates.solution_spec import SolutionError, parse_solution

BANNED_IMPORTS = frozenset({"socket", "subprocess", "multiprocessing", "gc", "inspect", "specgen_engine"})
"""Nothing a kernel needs; each is the first step of a known way to cheat (tests/exploits)."""


class Fault(NamedTuple):
    """Why a text is not run: status rejected or compile_error, and one line."""

    status: Status
    reason: str


def static_check(source: str, source_bytes: int, *, imports: bool = True) -> Fault | None:
    """Why a text can't be evaluated, or None. Raises nothing, whatever the text.

    imports: look for BANNED_IMPORTS too.
    """
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
    if is_cuda_text(source):
        return check_entry(source)
    solution = solution_of(source)
    if solution is not None:
        return _solution_fault(solution, imports)
    fault = _python_fault(source, imports)
    if fault is None and python_interface(source) is None:
        names = "class ModelNew (nor custom_kernel, nor run)"
        return Fault(Status.COMPILE_ERROR, f"the source defines no {names}")
    return fault


def _python_fault(source: str, imports: bool, where: str = "") -> Fault | None:
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return Fault(Status.COMPILE_ERROR, f"{where}line {error.lineno}: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        return Fault(Status.COMPILE_ERROR, f"{where}the source can't be parsed: {error or type(error).__name__}")
    banned = _banned(tree) if imports else None
    return Fault(Status.REJECTED, where + banned) if banned else None


def _banned(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            if name.split(".")[0] in BANNED_IMPORTS:
                return f"line {node.lineno}: import of {name} is not allowed in a candidate"
    return None


def check_entry(source: str) -> Fault | None:
    """Of a plain .cu: is its entry declared, and does the text define it?"""
    try:
        entry = parse_entry(source)
    except EntryError as error:
        return Fault(Status.COMPILE_ERROR, str(error))
    if not entry.defined_in(source):
        return Fault(Status.COMPILE_ERROR, f'the source defines no extern "C" int {entry.name}(...), which it declares')
    return None


def _solution_fault(solution: dict[str, Any], imports: bool) -> Fault | None:
    try:
        parsed = parse_solution(solution)
    except SolutionError as error:
        return Fault(Status.COMPILE_ERROR, str(error))
    for path, content in parsed.sources.items():
        fault = _python_fault(content, imports, f"{path}: ") if path.endswith(".py") else None
        if fault:
            return fault
    return None

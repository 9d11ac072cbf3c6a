"""What form a candidate's text has. Only the text is read; nothing of it runs."""

from __future__ import annotations

import ast
import json
import re
from enum import StrEnum
from typing import Any

_CUDA_LINE = re.compile(r"^\s*(?://\s*specgen:|#include\b|extern\s+\"C\"|__global__\b|template\s*<)", re.MULTILINE)


class Interface(StrEnum):
    """How a candidate is called."""

    MODULE = "module"  # class ModelNew
    GPU_MODE = "gpumode"  # custom_kernel(data)
    FUNCTION = "function"  # run(*inputs), FlashInfer Trace's signature
    SOLUTION = "solution"  # a FlashInfer Trace Solution as JSON
    ENTRY = "cuda"  # a plain .cu with a declared entry


class Language(StrEnum):
    PYTORCH = "pytorch"
    TRITON = "triton"
    CUDA = "cuda"
    CUTE_DSL = "cute_dsl"
    CPP = "cpp"
    OTHER = "other"


ENTRIES = {"ModelNew": Interface.MODULE, "custom_kernel": Interface.GPU_MODE, "run": Interface.FUNCTION}
"""Names a Python candidate may define, best first."""


def detect_form(source: str) -> str:
    """Its form as verdicts name it: "triton", "cuda_inline", "cuda", "gpumode/triton", "solution/cuda"; never raises.

    A ModelNew is named by its language alone.
    """
    if solution_of(source) is not None:
        spec = (solution_of(source) or {}).get("spec")
        language = spec.get("language") if isinstance(spec, dict) else None
        known = str(language).lower() if str(language).lower() in {str(name) for name in Language} else Language.OTHER
        return f"{Interface.SOLUTION}/{Language.PYTORCH if language == 'python' else known}"
    if is_cuda_text(source):
        return str(Interface.ENTRY)
    interface = python_interface(source)
    language = _python_language(source)
    if interface is None or interface is Interface.MODULE:
        return language
    return f"{interface}/{language}"


def solution_of(source: str) -> dict[str, Any] | None:
    """The JSON object of a FlashInfer Trace Solution, or None."""
    if not source.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and {"spec", "sources"} <= value.keys() else None


def is_cuda_text(source: str) -> bool:
    """CUDA C++ rather than Python: it has a line that only C++ has, and no Python parser takes it."""
    return _CUDA_LINE.search(source) is not None and _parsed(source) is None


def python_interface(source: str) -> Interface | None:
    """The best of ENTRIES that a module defines at its top level."""
    tree = _parsed(source)
    if tree is None:
        return None
    names = defined_names(tree)
    return next((interface for name, interface in ENTRIES.items() if name in names), None)


def defined_names(tree: ast.Module) -> set[str]:
    """Names that a module binds at its top level: classes, functions, assignments, imports."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def _python_language(source: str) -> str:
    tree = _parsed(source)
    if tree is None:
        return str(Language.OTHER)
    modules: set[str] = set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    if "cutlass" in modules:
        return str(Language.CUTE_DSL)
    if {"load_inline", "load"} & names and ("cpp_extension" in names or "load_inline" in names):
        return "cuda_inline" if _mentions_cuda(tree) else "cpp_inline"
    return str(Language.TRITON if "triton" in modules else Language.PYTORCH)


def _mentions_cuda(tree: ast.Module) -> bool:
    """Does a load_inline call pass cuda_sources, or is a kernel in one of its texts?"""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "cuda_sources":
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "__global__" in node.value:
            return True
    return False


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None

"""A FlashInfer Trace Solution read from its JSON, without the package, which an evaluator need not have.

The schema is flashinfer_bench.data.solution's; `specgen evaluate` also validates with that where it is installed.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, NamedTuple

LANGUAGES = ("python", "triton", "cuda", "cpp", "cute_dsl")


class SolutionError(ValueError):
    """A Solution that can't be built; one line."""


class SolutionSpec(NamedTuple):
    """sources: text by relative path, in the order given.  in_place: the outputs come as the last arguments."""

    name: str
    language: str
    binding: str
    file: str
    symbol: str
    in_place: bool
    sources: dict[str, str]


def parse_solution(solution: dict[str, Any]) -> SolutionSpec:
    """Raises SolutionError naming the field."""
    spec = solution.get("spec")
    if not isinstance(spec, dict):
        raise SolutionError("the solution's spec is no object")
    language = str(spec.get("language", "")).lower()
    if language not in LANGUAGES:
        raise SolutionError(f"spec.language={language!r} can't be built here: {', '.join(LANGUAGES)} can")
    file, double, symbol = str(spec.get("entry_point", "")).partition("::")
    if not double or not symbol.isidentifier():
        raise SolutionError(f"spec.entry_point={spec.get('entry_point')!r}: use FILE::FUNCTION")
    sources = _sources(solution.get("sources"))
    if file not in sources:
        raise SolutionError(f"spec.entry_point names {file!r}, which is not among the sources")
    binding = str(spec.get("binding") or ("tvm-ffi" if language in ("cuda", "cpp") else ""))
    if binding not in ("", "torch", "tvm-ffi"):
        raise SolutionError(f"spec.binding={binding!r}: use torch or tvm-ffi")
    in_place = spec.get("destination_passing_style", True)
    return SolutionSpec(str(solution.get("name", "")), language, binding, file, symbol, bool(in_place), sources)


def _sources(listed: Any) -> dict[str, str]:
    if not isinstance(listed, list) or not listed:
        raise SolutionError("the solution has no sources")
    sources: dict[str, str] = {}
    for one in listed:
        path, content = (one.get("path"), one.get("content")) if isinstance(one, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(content, str):
            raise SolutionError("a source needs a path and a content, both texts")
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or not pure.name:
            raise SolutionError(f"the source path {path!r} leaves its folder")
        if path in sources:
            raise SolutionError(f"the source path {path!r} is there twice")
        sources[path] = content
    return sources

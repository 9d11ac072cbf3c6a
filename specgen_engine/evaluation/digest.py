"""From a traceback or a compiler's output to the few lines that a language model can use."""

from __future__ import annotations

import re

_COMPILER = re.compile(
    r"^(?P<where>[^\s:()]+[:(]\d+[:)]?(?:\d+:?)?)\s*:?\s*(?:fatal\s+)?error\s*:?\s*(?P<what>.+)$", re.M
)
_LINKER = re.compile(r"^.*(undefined reference to|undefined symbol|multiple definition of).*$", re.M)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]*candidate\.py)", line (?P<line>\d+)', re.M)
_HINTS = (
    ("No such file or directory", "a header is missing: use those of torch, CUDA or the C++ standard library"),
    ("undefined reference", "a declared function has no definition with the same signature"),
    ("undefined symbol", "a declared function has no definition with the same signature"),
    ("was not declared in this scope", "include its header or declare it before its use"),
    ("ninja: build stopped", "the compiler's first error is above"),
    ("out of memory", "less memory: smaller buffers, or work in blocks"),
    ("can't allocate memory", "less memory: smaller buffers, or work in blocks"),
    ("NVIDIA driver", "this evaluator has no GPU: the kernel must run on the CPU"),
    ("nvcc", "nvcc is not installed here: the kernel can't be CUDA C++"),
    ("illegal memory access", "an index leaves its tensor: check bounds and masks"),
    ("No module named", "only torch, triton, numpy and the standard library can be imported"),
)


def error_digest(text: str, source: str = "", lines: int = 12) -> str:
    """First error, the line it is at and a hint; at most `lines` lines. Empty for an empty text."""
    text = text.strip()
    if not text:
        return ""
    parts = [*_first_error(text), *_own_line(text, source)]
    hint = next((hint for sign, hint in _HINTS if sign in text), "")
    if hint:
        parts.append(f"hint: {hint}")
    return "\n".join(part[:300] for part in parts[:lines])


def _first_error(text: str) -> list[str]:
    found = _COMPILER.search(text)
    if found:
        where = found["where"].rstrip(":").rsplit("/", 1)[-1]
        after = text[found.end() :].strip("\n").splitlines()[:3]
        excerpt = [line.rstrip() for line in after if re.match(r"^\s*\d*\s*\|", line)]
        return [f"{where}: error: {found['what'].strip()}", *excerpt]
    found = _LINKER.search(text)
    if found:
        return [found[0].strip()]
    last = [line for line in text.splitlines() if line.strip()]
    final = next((line for line in reversed(last) if re.match(r"^[\w.]+(Error|Exception|Exit|Interrupt)\b", line)), "")
    return [final or last[-1].strip()]


def _own_line(text: str, source: str) -> list[str]:
    frames = list(_FRAME.finditer(text))
    if not frames:
        return []
    number = int(frames[-1]["line"])
    code = source.splitlines()
    return [f"line {number}: {code[number - 1].strip()}" if 0 < number <= len(code) else f"line {number}"]

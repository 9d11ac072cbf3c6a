"""From a traceback or a compiler's output to the few lines that a language model can use.

Known shapes: g++, nvcc and the linker; Triton's CompilationError; the CuTe DSL's boxed errors; Python tracebacks.
"""

from __future__ import annotations

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"^[\w.]+(?:Error|Exception): (?=\S+[:(]\d+)", re.MULTILINE)
_COMPILER = re.compile(
    r"^(?P<where>[^\s:()]+[:(]\d+[:)]?(?:\d+:?)?)\s*:?\s*(?:fatal\s+)?error\s*:?\s*(?P<what>.+)$", re.MULTILINE
)
_LINKER = re.compile(r"^.*(undefined reference to|undefined symbol|multiple definition of).*$", re.MULTILINE)
_TRITON = re.compile(r"CompilationError: at (?P<line>\d+):(?P<column>\d+):\n(?P<body>.*)\Z", re.DOTALL)
_CUTE = re.compile(r"^(?:[\w.]*\.)?DSL\w*Error:\s*\n\s*error: (?P<what>.+)$", re.MULTILINE)
_CUTE_PLACE = re.compile(r"^\s*--> (?P<file>\S+):(?P<line>\d+)$", re.MULTILINE)
_CUTE_ADVICE = re.compile(r"^\s*suggestion: (?P<text>(?:.+\n?)+)", re.MULTILINE)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]*candidate\.py)", line (?P<line>\d+)', re.MULTILINE)
_HINTS = (
    ("No such file or directory", "a header is missing: use those of torch, CUDA or the C++ standard library"),
    ("undefined reference", "a declared function has no definition with the same signature"),
    ("undefined symbol", "a declared function has no definition with the same signature"),
    ("was not declared in this scope", "include its header or declare it before its use"),
    ("is undefined", "include its header or declare it before its use"),
    ("no instance of", "no overload takes these arguments: check their types and number"),
    ("must be a power of 2", "Triton's ranges are powers of two: take triton.next_power_of_2 and mask the rest"),
    ("incompatible dimensions", "the shapes don't broadcast: pointers, values and masks need one shape"),
    ("ninja: build stopped", "the compiler's first error is above"),
    ("nvcc is not installed", "nvcc is not installed here: the kernel can't be CUDA C++"),
    ("out of memory", "less memory: smaller buffers, or work in blocks"),
    ("can't allocate memory", "less memory: smaller buffers, or work in blocks"),
    ("out of resource: shared memory", "less shared memory: smaller blocks or fewer stages"),
    ("cudaErrorInsufficientDriver", "this evaluator has no GPU: the kernel must run on the CPU"),
    ("NVIDIA driver", "this evaluator has no GPU: the kernel must run on the CPU"),
    ("illegal memory access", "an index leaves its tensor: check bounds and masks"),
    ("No module named", "only torch, triton, cutlass, numpy and the standard library can be imported"),
)
_EXCERPT_LINES = 3
_JUST_IN_TIME = re.compile(
    r"^triton\.[\w.]*\b(CompilationError)\b|^cutlass\.[\w.]*\b(DSL\w*Error|CompilerDiagnosticError)\b", re.MULTILINE
)
_AT_RUN_TIME = ("DSLCudaRuntimeError", "DSLSubprocessCallError")


def error_digest(text: str, source: str = "", lines: int = 12) -> str:
    """First error with its file and line, the text there, a hint; at most `lines` lines. Empty for an empty text."""
    text = _COLOUR.sub("", text).strip()
    if not text:
        return ""
    parts = _triton_error(text) or _cute_error(text) or [*_first_error(text), *_own_line(text, source)]
    hint = next((hint for sign, hint in _HINTS if sign in text), "")
    if hint and not any(part.startswith("hint: ") for part in parts):
        parts = [*parts[: lines - 1], f"hint: {hint}"]
    return "\n".join(part[:300] for part in parts[:lines])


def is_compile_error(text: str) -> bool:
    """Does a traceback come from a compiler that ran when the kernel was first called, or from load_inline?"""
    last = [match[1] or match[2] for match in _JUST_IN_TIME.finditer(text)]
    return "Error building extension" in text or bool(last and last[-1] not in _AT_RUN_TIME)


def _first_error(text: str) -> list[str]:
    text = _RAISED.sub("", text)
    found = _COMPILER.search(text)
    if found:
        where = found["where"].rstrip(":").rsplit("/", 1)[-1]
        return [f"{where}: error: {found['what'].strip()}", *_excerpt(text[found.end() :])]
    found = _LINKER.search(text)
    if found:
        return [found[0].strip()]
    last = [line for line in text.splitlines() if line.strip()]
    final = next((line for line in reversed(last) if re.match(r"^[\w.]+(Error|Exception|Exit|Interrupt)\b", line)), "")
    return [final or last[-1].strip()]


def _excerpt(after: str) -> list[str]:
    """The source line under a compiler's error: g++ numbers it, nvcc indents it and puts a caret below."""
    following = after.strip("\n").splitlines()[:_EXCERPT_LINES]
    numbered = [line.rstrip() for line in following if re.match(r"^\s*\d*\s*\|", line)]
    if numbered:
        return numbered
    if len(following) >= 2 and following[1].strip() == "^":
        return [following[0].rstrip(), following[1].rstrip()]
    return []


def _triton_error(text: str) -> list[str]:
    """Line and column count from the kernel's def; the message stands below a copy of the text up to there."""
    found = _TRITON.search(text)
    if found is None:
        return []
    body = found["body"].splitlines()
    caret = next((index for index, line in enumerate(body) if line.strip() == "^"), -1)
    message = " ".join(line.strip() for line in body[caret + 1 :] if line.strip()) or "does not compile"
    code = [line.rstrip() for line in body[max(0, caret - 1) : caret + 1]] if caret >= 0 else []
    kernel = re.search(r"^\s*def (\w+)", found["body"])
    where = f"{kernel[1]}, line {found['line']} of the kernel" if kernel else f"line {found['line']} of the kernel"
    return [f"{where}: error: {message}", *code]


def _cute_error(text: str) -> list[str]:
    found = _CUTE.search(text)
    if found is None:
        return []
    rest = text[found.end() :]
    place = _CUTE_PLACE.search(rest)
    where = f"{place['file'].rsplit('/', 1)[-1]}:{place['line']}: " if place else ""
    code = [line for line in rest.splitlines() if place and re.match(rf"^\s*{place['line']} \|", line)][:1]
    advice = _CUTE_ADVICE.search(rest)
    hint = [f"hint: {' '.join(advice['text'].split())}"] if advice and place else []
    return [f"{where}error: {found['what'].strip()}", *code, *hint]


def _own_line(text: str, source: str) -> list[str]:
    frames = list(_FRAME.finditer(text))
    if not frames:
        return []
    number = int(frames[-1]["line"])
    code = source.splitlines()
    return [f"line {number}: {code[number - 1].strip()}" if 0 < number <= len(code) else f"line {number}"]

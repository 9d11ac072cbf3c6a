"""Which recording a search plays, and what its base and its forks say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from specgen_engine.controller.thinking import STYLES
from specgen_engine.replay.book import NO_ANSWER, ReplayBook
from specgen_engine.replay.trace import TraceError, load_traces

BUNDLED = Path(__file__).parents[2] / "specgen_engine" / "replay" / "bundled" / "cpu_row_softmax"
TRACE = load_traces([BUNDLED])[0]


class Characters:
    """A tokenizer whose tokens are characters."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": self.encode(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text]


def text(ids: list[int]) -> str:
    assert ids[-1] == 0
    return "".join(map(chr, ids[:-1]))


@pytest.fixture
def book() -> ReplayBook:
    return ReplayBook.load([BUNDLED], Characters(), STYLES["deepseek"])


def test_the_base_says_the_whole_recording(book: ReplayBook) -> None:
    recording = book.recording(TRACE.task_hash, None)
    assert recording is not None
    whole = text(recording.base_ids(opened=True))
    assert whole == TRACE.iterations[0].reasoning + "</think>" + TRACE.iterations[0].final
    assert text(recording.base_ids(opened=False)) == "<think>" + whole


def test_a_fork_says_the_nearest_earlier_answer(book: ReplayBook) -> None:
    recording = book.recording(TRACE.task_hash, 1)
    assert recording is not None
    first, second = recording.tokens.positions[:2]
    assert recording.fork_ids(first - 1)[0] is None
    assert text(recording.fork_ids(first - 1)[1]) == NO_ANSWER
    name, ids = recording.fork_ids(second - 1)
    assert (name, text(ids)) == ("fork-1", TRACE.iterations[0].forks[1])
    assert recording.fork_ids(second)[0] == "fork-2"


def test_iterations_are_played_in_turn_or_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "task"
    shutil.copytree(BUNDLED, folder)
    shutil.copytree(folder / "iter-1", folder / "iter-2")
    book = ReplayBook.load([folder], Characters(), STYLES["deepseek"])
    turns = [book.recording(TRACE.task_hash, None) for _ in range(3)]
    assert [turn.number for turn in turns if turn] == [1, 2, 1]
    two = book.recording(TRACE.task_hash, 2)
    assert two is not None
    assert two.number == 2
    with pytest.raises(ValueError, match="3 is not recorded; use one of 1, 2"):
        book.recording(TRACE.task_hash, 3)
    assert book.recording("unknown", None) is None


def test_two_traces_of_one_task_are_refused(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "a")
    shutil.copytree(BUNDLED, tmp_path / "b")
    with pytest.raises(TraceError, match="has the same task as"):
        ReplayBook.load([tmp_path], Characters(), STYLES["deepseek"])

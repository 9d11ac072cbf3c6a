"""The rows of specgen.report/1, made from a search's record; no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.controller.report import CandidateRecord, SearchRecord
from specgen_engine.errors import SpecGenError
from specgen_engine.evaluation.base import Candidate, Status
from specgen_engine.replay.command import ReplayOptions, one_line, recorded_sources, row_of
from specgen_engine.replay.trace import load_traces

BUNDLED = Path(__file__).parents[2] / "specgen_engine" / "replay" / "bundled" / "cpu_row_softmax"
ITERATION = load_traces([BUNDLED])[0].iterations[0]
FIELDS = {
    "trace", "iteration", "wall_s", "reasoning_tokens", "recorded_reasoning_tokens", "ended_by", "accepted", "answer",
    "forks", "candidates",
}  # fmt: skip


def row(answer: str = "text", **changes: Any) -> dict[str, Any]:
    source = extract_candidate(ITERATION.forks[3])
    assert source is not None
    record = SearchRecord("id", "t", "h", "every:400", "none", 0.0, trace="cpu_row_softmax", iteration=1, **changes)
    record.candidates.append(CandidateRecord(Candidate(source).hash, "fork", 1.0, status=Status.CORRECT, speedup=2.0))
    return row_of(record.to_dict(), ITERATION, answer, {})


def test_a_row_has_what_the_schema_names_and_says_which_answer_a_candidate_was() -> None:
    one = row()
    assert set(one) >= FIELDS
    assert one["candidates"][0]["recorded_answer"] == "fork-3"
    assert one["recorded_final"] == {"status": "correct", "speedup": 4.89}


def test_a_reasoning_that_was_cut_inside_a_fence_hides_no_answer() -> None:
    """The replaying server has no reasoning parser: the cut reasoning comes before the answer."""
    cut = "First the maximum.\n\n```cpp\nconst __m256 m = set1(hmax(m0"
    one = row(f"{cut}</think>{ITERATION.forks[3]}")
    assert one["answer"] == ITERATION.forks[3]
    assert row(ITERATION.final)["answer"] == ITERATION.final


def test_every_recorded_answer_of_the_bundled_trace_is_known() -> None:
    assert {name for name, _ in recorded_sources(ITERATION)} == {*(f"fork-{n}" for n in range(1, 6)), "final"}


@pytest.mark.parametrize("wrong", [{"mode": "fast"}, {"trigger": "often"}, {"termination": "soon"}])
def test_options_are_checked_before_a_server_is_started(wrong: dict[str, str]) -> None:
    with pytest.raises((SpecGenError, ValueError)) as error:
        ReplayOptions((BUNDLED,), **wrong)  # type: ignore[arg-type]
    assert next(iter(wrong.values())) in str(error.value)


@pytest.mark.parametrize("share", [7, 0, -1, float("nan")])
def test_a_base_share_is_refused_under_its_own_name(share: float) -> None:
    with pytest.raises(SpecGenError, match=f"^--base-share {share}: use a share above 0, at most 1"):
        ReplayOptions((BUNDLED,), base_share=share)


@pytest.mark.parametrize(("counted", "said"), [(3474, "3472 of 3472 "), (1200, "1200 of 3472 ")])
def test_a_line_never_says_more_tokens_than_were_recorded(counted: int, said: str) -> None:
    assert f", {said}reasoning tokens" in one_line(
        row(reasoning_tokens=counted, recorded_reasoning_tokens=3472, wall_s=1.0)
    )

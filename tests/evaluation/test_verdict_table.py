"""What a reader of `specgen evaluate` sees of a verdict."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from specgen_engine.evaluation.base import Status, Verdict
from specgen_engine.evaluation.verdict_table import Judged, row_of, table_of


def judged(**fields: object) -> Judged:
    known = {"candidate": "ab", "status": Status.CORRECT, "speedup": 2.0, "interval": (1.1, 3.6)}
    known |= {"candidate_ms": 1.0, "reference_ms": 2.0} | fields
    return Judged(Path("kernel.py"), "", Verdict(**known))  # type: ignore[arg-type]


def shown(one: Judged) -> str:
    text = io.StringIO()
    Console(file=text, width=240).print(table_of("", [one]))
    return text.getvalue()


@pytest.mark.parametrize("said", ["", "known within 80% only: its rounds differ"])
def test_a_speed_up_that_is_not_known_well_is_shown_with_its_warning(said: str) -> None:
    one = judged(conditions={"warning": said} if said else {})
    assert ("known within" in shown(one)) == bool(said)
    assert "2.00x" in shown(one)
    assert row_of(one)["conditions"].get("warning", "") == said


def test_the_reason_of_a_rejection_goes_before() -> None:
    none = dict.fromkeys(("speedup", "interval", "candidate_ms", "reference_ms"))
    warned = {"warning": "known within 80% only"}
    one = judged(status=Status.REJECTED, reason="it changes its inputs", conditions=warned, **none)
    assert "it changes its inputs" in shown(one)
    assert "known within" not in shown(one)

"""What two runs of the same candidates say of the intervals; and that all candidates are what they are meant to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.evaluation_repeat import figures, pairs
from specgen_engine.evaluation.compare import difference


def row(name: str, run: int, low: float, speedup: float, high: float) -> dict[str, Any]:
    return {
        "candidate": name, "run": run, "status": "correct", "speedup": speedup, "interval": [low, high],
        "time_s": 0.5, "rounds_ms": [[2.0, 1.0]] * 5,
    }  # fmt: skip


def test_pairs_agree_where_their_intervals_overlap() -> None:
    rows = [row("a", 0, 1.0, 1.1, 1.2), row("a", 1, 1.15, 1.3, 1.4), row("b", 0, 1.0, 1.1, 1.2)]
    rows += [row("b", 1, 1.3, 1.4, 1.5), {"candidate": "c", "run": 0, "status": "wrong"}]
    told = figures(rows)
    assert (told["candidates"], told["pairs"], told["intervals_overlap"], told["other_speedup_inside"]) == (2, 2, 1, 0)
    assert told["half_width"]["n"] == 4
    assert [one["candidate"] for one in told["not_correct"]] == ["c"]


def test_three_runs_are_three_pairs() -> None:
    told = figures([row("a", run, 1.0, 1.1 + run / 100, 1.2) for run in range(3)])
    assert (told["pairs"], told["intervals_overlap"], told["other_speedup_inside"]) == (3, 3, 3)


@pytest.mark.parametrize(("name", "task", "candidate"), pairs(), ids=[name for name, _, _ in pairs()])
def test_every_candidate_computes_what_its_reference_does(name: str, task: Any, candidate: Any) -> None:
    reference, other = {}, {}
    exec(task.source, reference)
    exec(candidate.source, other)
    models = []
    for module, entry in ((reference, "Model"), (other, "ModelNew")):
        torch.manual_seed(0)
        models.append(module[entry]())
    inputs = reference["get_inputs"]()
    with torch.no_grad():
        assert difference(models[1](*inputs), models[0](*inputs)) is None

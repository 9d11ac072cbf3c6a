"""The copies' bench as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import elastic_copies
from bench.elastic_copies import variation


def test_variation_worked_out_by_hand() -> None:
    assert variation([1000, 2000, 3000]) == {
        "calls": 3, "median_us": 2.0, "cv": 0.5, "robust_cv": round(2 / 1.349 / 2, 5),
    }  # fmt: skip
    steady = [1000, 1010] * 50
    assert variation([*steady, 90_000])["cv"] > 1.0
    assert variation([*steady, 90_000])["robust_cv"] < 0.01, "one spike is no variation of the kernel"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so without a GPU only")
def test_without_a_gpu_it_is_skipped(capsys: pytest.CaptureFixture) -> None:
    assert elastic_copies.main([]) == 0
    assert capsys.readouterr().out == "skipped: needs a GPU\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--repeats", "0"], "--repeats 0: use a number above 0"),
        (["--seconds", "5"], "--seconds 5: a lease lasts 5 s at most; use less"),
    ],
)
def test_turns_that_say_nothing_are_refused(words: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        elastic_copies.main(words)
    assert says in capsys.readouterr().err


def test_a_lease_keeps_copies_off_for_as_long_as_it_is_held(tmp_path: Path) -> None:
    report = tmp_path / "copies.json"
    assert elastic_copies.main(f"--device cpu --seconds 0.5 --mib 4 --json {report}".split()) == 0
    rows = json.loads(report.read_text())["rows"]
    assert list(rows) == list(elastic_copies.TURNS)
    assert rows["copies"]["copied_gbps"] > 0.1
    assert rows[elastic_copies.LEASE]["reached"] is True
    assert [rows[turn]["copied_gbps"] for turn in elastic_copies.TURNS if turn != "copies"] == [0.0, 0.0, 0.0]

"""A single verdict on a host that may lack what the candidate needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.evaluation_one import main
from tests.evaluation.conftest import TASK, module


@pytest.mark.parametrize("needs", ["torch", "no_such_package"])
def test_a_candidate_is_judged_or_the_missing_package_is_named(tmp_path: Path, monkeypatch, capsys, needs: str) -> None:
    task, candidate, report = tmp_path / "task.py", tmp_path / "candidate.py", tmp_path / "f.json"
    task.write_text(TASK.source)
    candidate.write_text(module())
    words = ["", str(task), str(candidate), "--json", str(report), "--device", "cpu", "--needs", needs]
    monkeypatch.setattr("sys.argv", words)
    assert main() == 0
    told = json.loads(report.read_text())
    if needs == "torch":
        assert told["verdict"]["status"] == "correct", told
        assert "'status': 'correct'" in capsys.readouterr().out
    else:
        assert "verdict" not in told
        assert "candidate.py needs the package no_such_package" in told["skipped"]

from __future__ import annotations

import json
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from specgen_engine import doctor
from specgen_engine.doctor import Piece
from specgen_engine.evaluation import sandbox

FIT = {"target": "sglang.a", "kind": "AFTER", "purpose": "p", "process": "all", "problem": ""}
BROKEN = {**FIT, "target": "sglang.b", "problem": "no such attribute"}


@pytest.fixture
def without_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_hooks", lambda: {"rows": [FIT, BROKEN], "error": "", "sglang": "0.5.17"})


def test_every_missing_piece_says_what_it_costs(without_hooks: None) -> None:
    findings = doctor.collect()
    assert {piece["section"] for piece in findings["pieces"]} == {
        "versions",
        "gpus",
        "compilers",
        "profilers",
        "sandbox",
        "extension",
        "models",
    }
    assert [piece["name"] for piece in findings["pieces"] if not piece["found"] and not piece["cost"]] == []
    found = {piece["name"]: piece["found"] for piece in findings["pieces"]}
    assert found["sglang"] == version("sglang")
    assert found["level in force"] == (sandbox.level("prefer") if sandbox.offered() else "")
    assert "13.0" in found["nvcc (package)"]


def test_report_is_one_line_a_piece_and_names_broken_hooks(
    without_hooks: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = tmp_path / "doctor.json"
    assert doctor.doctor(written) == 0
    findings = json.loads(written.read_text())
    assert findings["schema"] == doctor.SCHEMA
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  ") for line in lines) == len(findings["pieces"]) + 2
    assert "  1 of 2 fit sglang 0.5.17" in lines
    assert "  sglang.b: no such attribute: --enable-specgen refuses to start" in lines
    assert list(tmp_path.iterdir()) == [written]


def test_probe_that_raises_is_a_row() -> None:
    def broken() -> list[Piece]:
        raise OSError("driver gone")

    (piece,) = doctor._bounded("gpus", broken)
    assert piece == Piece("gpus", "gpus", "", "the probe failed: OSError: driver gone")


def test_probe_that_hangs_is_a_row() -> None:
    release = threading.Event()
    started = time.monotonic()

    def hang() -> list[Piece]:
        release.wait(30)
        return []

    (piece,) = doctor._bounded("gpus", hang, limit_s=0.2)
    release.set()
    assert time.monotonic() - started < 5
    assert piece.cost == "the probe did not answer within 0.2 s"


@pytest.mark.parametrize(
    ("script", "answer"),
    [("echo one; echo two", "one"), ("echo broken; exit 3", ""), ("echo warn >&2", "warn"), ("sleep 30", "")],
)
def test_command_answers_its_first_line_or_nothing(
    script: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/bash\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor, "COMMAND_LIMIT_S", 1.0)
    assert doctor._command(str(tool)) == answer


def test_hooks_that_cannot_be_asked_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    hooks = doctor._hooks()
    assert hooks["rows"] == []
    assert hooks["error"]


@pytest.mark.slow
def test_real_hooks_fit_the_locked_sglang() -> None:
    hooks = doctor._hooks()
    assert hooks["error"] == ""
    assert hooks["rows"]
    assert [row for row in hooks["rows"] if row["problem"]] == []

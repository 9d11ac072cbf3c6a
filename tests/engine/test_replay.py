"""`specgen replay` on a copy of the bundled trace in which one answer does not compile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.replay.trace import load_traces
from tests.engine.conftest import BUNDLED, QUICK_ANSWER

WANTED = {"fork-1": "correct", "fork-2": "wrong", "fork-3": "correct", "fork-4": "compile_error", "fork-5": "correct"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces") / "copy"
    shutil.copytree(BUNDLED, folder)
    (folder / "iter-1" / "measured.json").unlink()
    answer = folder / "iter-1" / "fork-4.md"
    answer.write_text(
        answer.read_text().replace("torch::Tensor softmax_scale(", "torch::Tensor softmax_scale(oops ", 1)
    )
    return folder


@pytest.fixture
def quick(trace: Path, tmp_path: Path) -> Path:
    """Its first answer is judged in seconds: a compiler on a busy machine outlasts what is left of the reasoning."""
    folder = tmp_path / "quick"
    shutil.copytree(trace, folder)
    (folder / "iter-1" / "fork-1.md").write_text(QUICK_ANSWER)
    return folder


def replay(trace: Path, *arguments: str) -> dict[str, Any]:
    report = trace.parent / "report.json"
    command = [sys.executable, "-m", "specgen_engine", "replay", str(trace), "--json", str(report), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(report.read_text())


def check_forks(row: dict[str, Any]) -> None:
    finished = [fork for fork in row["forks"] if fork["state"] in ("stop", "length")]
    assert finished
    for fork in finished:
        assert fork["prefix_reused"] >= 0.99 * (fork["prompt_tokens"] + fork["at_token"]) - fork["page_size"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_criterion_ends_the_reasoning_early(quick: Path) -> None:
    report = replay(quick, "--termination", "speedup:1.2")
    (row,) = report["traces"]
    check_forks(row)
    assert report["schema"] == "specgen.report/1"
    assert row["ended_by"] == "criterion"
    assert row["reasoning_tokens"] < row["recorded_reasoning_tokens"]
    accepted = next(c for c in row["candidates"] if c["hash"] == row["accepted"]["hash"])
    assert accepted["speedup"] >= 1.2
    assert accepted["recorded_answer"] == "fork-1"
    assert extract_candidate(row["answer"]) == extract_candidate(load_traces([quick])[0].iterations[0].forks[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_criterion_every_answer_gets_its_verdict(trace: Path) -> None:
    (row,) = replay(trace, "--termination", "none", "--trigger", "every:400")["traces"]
    check_forks(row)
    assert row["ended_by"] == "reasoning"
    judged = {c["recorded_answer"]: c["status"] for c in row["candidates"] if c["status"] != "cancelled"}
    assert judged.items() <= {**WANTED, "final": "correct"}.items()
    assert "fork-4" in judged


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sequential_reasons_to_its_end_and_judges_the_final_answer(trace: Path) -> None:
    (row,) = replay(trace, "--mode", "sequential")["traces"]
    assert row["forks"] == []
    assert row["final"]["speedup"] is not None
    assert row["accepted"] == row["final"]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for words, says in (
        (["nowhere"], "no such folder"),
        ([str(BUNDLED), "--mode", "fast"], "--mode 'fast'"),
        ([str(BUNDLED), "--trigger", "often"], "--trigger='often'"),
        ([str(BUNDLED), "--json", str(tmp_path / "no" / "r.json")], "does not exist"),
    ):
        command = [sys.executable, "-m", "specgen_engine", "replay", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert says in line

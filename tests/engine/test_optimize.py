"""`specgen optimize` through the real engine: killed at random points and resumed, it ends as an unbroken run does."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specgen_engine.agent.history import History
from specgen_engine.evaluation.base import Task
from tests.engine.conftest import BUNDLED, QUICK_ANSWER, TASK, Client, StartServer

ITERATIONS = 2
LONGEST_S = 600


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled reasoning, with one answer that needs no compiler at every fork: how soon a machine compiles
    C++ would decide whether a reasoning ends by a verdict or by itself, and which fork's verdict that is."""
    folder = tmp_path_factory.mktemp("recorded") / BUNDLED.name
    shutil.copytree(BUNDLED, folder)
    for answer in folder.glob("iter-1/fork-*.md"):
        answer.write_text(QUICK_ANSWER)
    return folder


@pytest.fixture(scope="module")
def replaying(start_server: StartServer, recorded: Path) -> Iterator[Client]:
    """Ends each reasoning at the first correct kernel."""
    words = ["--tiny", "--replay", str(recorded), "--specgen-trigger", "every:400", "--specgen-termination", "correct"]
    with start_server(*words, "--specgen-evaluation-pause", "0.5") as client:
        yield client


def start(client: Client, out: Path, *arguments: str) -> subprocess.Popen[str]:
    words = ["optimize", str(BUNDLED / "task.py"), "--base-url", f"{client.server.url}/v1", "--out", str(out)]
    words += ["--iterations", str(ITERATIONS), *arguments]
    command = [sys.executable, "-m", "specgen_engine", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)


def interruptible() -> None:
    """A test run in the background of a shell has SIGINT ignored, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    _, said = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, said[-2000:]
    return json.loads((out / "report.json").read_text())


def outcome(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What does not depend on the clock: who was asked, what was answered, what it was worth."""
    return [
        (
            one["search"],
            one["iteration"],
            one["source"],
            *((one["judgement"] or {}).get(key) for key in ("hash", "status")),
        )
        for one in report["attempts"]
    ]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("starts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_as_unbroken(replaying: Client, tmp_path: Path, starts: int) -> None:
    whole = tmp_path / "whole"
    unbroken = finish(start(replaying, whole), whole)
    assert [one["generation"]["search"]["ended_by"] for one in unbroken["attempts"]] == ["criterion"] * ITERATIONS
    state = replaying.get("/server_info").json()["internal_states"][0]["specgen"]
    assert state["pauses"]["count"] >= ITERATIONS, "the engine decoded while candidates were timed"

    seed = random.randrange(1 << 30)
    points, cut, kills = random.Random(seed), tmp_path / "cut", 0
    for _ in range(starts):
        process = start(replaying, cut)
        time.sleep(points.uniform(3.0, unbroken["seconds"] / 2 + 3.0))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert kills, f"seed {seed}: every start had finished before its kill"
    resumed = finish(start(replaying, cut), cut)
    assert outcome(resumed) == outcome(unbroken), f"seed {seed}"
    assert (cut / "best.py").read_text() == (whole / "best.py").read_text(), f"seed {seed}"
    history = History(cut / "history.sqlite", Task(TASK).hash, {})
    assert json.loads(json.dumps([one.to_dict() for one in history.attempts()])) == resumed["attempts"]
    history.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_report_and_history_and_goes_on(replaying: Client, tmp_path: Path) -> None:
    process = start(replaying, tmp_path)
    while not (tmp_path / "report.json").exists():  # the first iteration's
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said[-2000:]
    assert "the same command goes on" in said
    assert "Traceback" not in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ended_by"] == "interrupted"
    assert report["attempts"]
    assert finish(start(replaying, tmp_path), tmp_path)["ended_by"] == "all iterations done"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_server_without_the_flag_is_a_plain_endpoint(start_server: StartServer, tmp_path: Path) -> None:
    """Random weights never close their thinking: the run ends without a kernel, and says so."""
    with start_server("--tiny", "--reasoning-parser", "deepseek-r1", specgen=False) as client:
        report = finish(start(client, tmp_path, "--max-tokens", "64"), tmp_path)
    assert not report["settings"]["speculative"]
    assert [one["source"] for one in report["attempts"]] == [None] * ITERATIONS
    assert all(one["generation"]["reasoned"] for one in report["attempts"])
    assert report["best"] is None

"""Processes that get ready at once: their steps are told, they ran side by side, and none is left (steps stand in)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.evaluation_contexts import CANDIDATE, JUDGE, VARIANTS, end, make, measure


def test_all_begin_at_once_and_tell_their_steps(tmp_path: Path) -> None:
    def meet(device: str) -> None:
        (tmp_path / str(os.getpid())).touch()
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.005)

    made, passed = make(3, [("meet", meet), ("sleep", lambda device: time.sleep(0.05))], "cpu", {})
    assert [one.fault for one in made] == [""] * 3
    assert all(0.05 <= one.seconds["sleep"] <= passed for one in made)
    assert end(made) < 5
    for one in made:
        with pytest.raises(ProcessLookupError):
            os.kill(one.pid, 0)


def test_a_process_that_fails_or_dies_is_told(tmp_path: Path) -> None:
    def fail(device: str) -> None:
        raise RuntimeError(f"no {device} here")

    rows = measure("gpu", [2], [0], 1, {"fails": [("fail", fail)], "dies": [("die", lambda device: os._exit(1))]})
    assert [row["faults"] for row in rows] == [["RuntimeError: no gpu here"], ["it died"]]


def test_the_environment_is_there_before_the_first_step_and_others_are_held_meanwhile(tmp_path: Path) -> None:
    seen = tmp_path / "seen"

    def note(device: str) -> None:
        with seen.open("a") as file:
            file.write(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "-") + " ")

    rows = measure("cpu", [1, 2], [0, 3], 1, {"candidate": [("note", note)], "candidate, one queue": [("note", note)]})
    assert [(row["kind"], row["at_once"], row["held"]) for row in rows[4:]] == [
        ("candidate", 1, 3), ("candidate", 2, 3), ("candidate, one queue", 1, 3), ("candidate, one queue", 2, 3),
    ]  # fmt: skip
    assert seen.read_text().split() == [*"---", *"111", *"---", *"---", *"111"]
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ


def test_kinds_are_those_that_workers_make() -> None:
    assert [name for name, _ in JUDGE][: len(CANDIDATE)] == [name for name, _ in CANDIDATE]
    assert set(VARIANTS) == {"candidate", "judge", "candidate, one queue"}

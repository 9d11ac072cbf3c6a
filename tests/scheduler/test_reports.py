"""What schedulers behind a data-parallel controller say of their hooks reaches the server all the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specgen_engine.scheduler import reports


def test_a_scheduler_of_the_servers_own_reports_in_its_init_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(reports.FOLDER, raising=False)
    reports.leave({"hooks": ["a"]})  # nobody waits: nothing is written
    assert reports.of_schedulers([{"specgen": {"hooks": ["a"]}}, {}]) == [{"hooks": ["a"]}, {}]


def test_those_behind_a_controller_leave_files_and_who_left_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(reports.FOLDER, "")
    reports.await_reports()
    folder = Path(os.environ[reports.FOLDER])
    reports.leave({"hooks": ["a"]})
    found = reports.of_schedulers([{reports.PIDS: [os.getpid(), 1]}])
    assert found == [{"hooks": ["a"]}, {}]
    assert not folder.exists()
    assert reports.FOLDER not in os.environ

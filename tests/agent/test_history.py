"""The history: each step is there after a kill, and a file that is not ours is refused."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from specgen_engine.agent.base import AgentError
from specgen_engine.agent.history import History
from tests.agent.test_base import attempt


def test_steps_are_replaced_and_survive_an_unclosed_file(tmp_path: Path) -> None:
    first = History(tmp_path / "h", "task", {})
    whole = attempt(1, 1.5)
    first.save(replace(whole, judgement=None, ended_s=None))
    first.save(whole)
    first._lock.release()  # what the kernel does when the process is killed
    second = History(tmp_path / "h", "task", {})
    assert second.attempts() == [whole]
    assert second.now() >= first.seconds()


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    one = History(tmp_path / "h", "task", {})
    with pytest.raises(AgentError, match="in use by another run"):
        History(tmp_path / "h", "task", {})
    one.close()
    History(tmp_path / "h", "task", {}).close()


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    History(tmp_path / "h", "task", {}).close()
    with pytest.raises(AgentError, match="of another task"):
        History(tmp_path / "h", "other", {})
    with sqlite3.connect(tmp_path / "h") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(AgentError, match="version 99, this program writes 1"):
        History(tmp_path / "h", "task", {})
    with sqlite3.connect(tmp_path / "foreign") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(AgentError, match="not written by specgen optimize"):
        History(tmp_path / "foreign", "task", {})
    (tmp_path / "text").write_text("not a database, but long enough to look like one" * 10)
    with pytest.raises(AgentError, match="not a usable history"):
        History(tmp_path / "text", "task", {})
    assert (tmp_path / "text").read_text().startswith("not a database")

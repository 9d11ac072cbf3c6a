"""The job journal: every job over once, after any crash; what it must refuse."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specgen_engine.pools.journal import VERSION, Entry, Journal, JournalError

ROOT = Path(__file__).parents[2]
JOBS = 3_000
WRITER = """
import sys
from specgen_engine.pools.journal import Journal

path, life, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
say = lambda *words: print(*words, flush=True)
journal = Journal(path)
recovered = journal.recover(tries=1000)
assert not recovered.reported
say("ready")
number = sum(journal.counts().values())
while True:
    for _ in range(3):
        if number < jobs:
            journal.submit(f"job-{number}", "search", "check", "source " * 50)
            say("submitted", f"job-{number}")
            number += 1
    waiting = journal.waiting()
    if not waiting and number == jobs:
        break
    for entry in waiting[:4]:
        attempt = journal.start(entry.id, life)
        say("started", entry.id, attempt)
        assert journal.finish(entry.id, attempt, f"{life}/{attempt}")
        say("finished", entry.id, f"{life}/{attempt}")
say("done")
"""


def test_a_job_is_finished_once_by_its_latest_attempt(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        journal.submit("a", "s", "check", "text")
        assert journal.start("a", "w1") == 1
        assert journal.start("a", "w2") is None
        assert [entry.id for entry in journal.recover("w1").retry] == ["a"]
        assert not journal.finish("a", 1, "correct"), "an attempt taken for dead came back while its job waited"
        assert journal.start("a", "w2") == 2
        assert not journal.finish("a", 1, "correct"), "an attempt taken for dead came back while its job ran elsewhere"
        assert journal.finish("a", 2, "wrong")
        assert not journal.finish("a", 2, "correct")
        assert not journal.report("a", "cancelled")
        assert journal.entry("a") == Entry("a", "s", "check", "text", "finished", 2, "wrong")
        with pytest.raises(ValueError, match="job='a': the journal has it already"):
            journal.submit("a", "s", "check")


def test_recovery_takes_back_the_dead_owners_jobs_and_gives_up_after_the_last_try(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        for name in ("old", "new", "other", "waits"):
            journal.submit(name, "s", "time")
        journal.start("old", "dead")
        journal.recover("dead")
        for name, owner in (("old", "dead"), ("new", "dead"), ("other", "alive")):
            assert journal.start(name, owner) is not None
        recovered = journal.recover("dead", tries=2)
        assert [entry.id for entry in recovered.retry] == ["new"]
        assert [(entry.id, entry.outcome) for entry in recovered.reported] == [("old", "crash")]
        assert journal.counts() == {"queued": 2, "running": 1, "finished": 0, "reported": 1}
        assert journal.entry("other").state == "running"
        assert journal.recover("dead") == ((), ())
        assert [entry.id for entry in journal.waiting()] == ["new", "waits"]


def test_old_outcomes_are_forgotten_and_open_jobs_never(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as journal:
        for name in ("over", "open"):
            journal.submit(name, "s", "check")
        journal.report("over", "cancelled")
        assert journal.forget(3600.0) == 0
        assert journal.forget(-1.0) == 1
        assert journal.counts() == {"queued": 1, "running": 0, "finished": 0, "reported": 0}


def start_writer(path: Path, life: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), f"life-{life}", str(JOBS)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_a_writer_killed_at_random_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    path, rng = tmp_path / "j.db", random.Random(5)
    submitted: list[str] = []
    finished: dict[str, str] = {}
    kills = 0
    for life in range(60):
        writer = start_writer(path, life)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        if life < 8:
            time.sleep(rng.uniform(0.0, 0.02))
            writer.send_signal(signal.SIGKILL)
        said = [line.split() for line in writer.stdout if line.endswith("\n")]
        kills += writer.wait() == -signal.SIGKILL
        for kind, *words in said:
            if kind == "submitted":
                submitted.append(words[0])
            elif kind == "finished":
                assert words[0] not in finished, "finished twice"
                finished[words[0]] = words[1]
        with Journal(path) as journal:
            for name in submitted:
                assert journal.entry(name) is not None, f"{name} was lost"
            for name, outcome in finished.items():
                assert journal.entry(name).outcome == outcome
        if ["done"] in said:
            break
    assert kills >= 5
    with Journal(path) as journal:
        assert journal.counts() == {"queued": 0, "running": 0, "finished": JOBS, "reported": 0}
        assert len(finished) >= JOBS - kills, "at most the job in flight may end without having been said"


def test_two_processes_share_a_journal_and_take_each_job_once(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.db") as one, Journal(tmp_path / "j.db") as two:
        for number in range(50):
            (one, two)[number % 2].submit(f"j{number}", "s", "check")
        taken = [journal.start(f"j{number}", "w") for number in range(50) for journal in (one, two)]
        assert taken.count(1) == 50
        assert taken.count(None) == 50


def journal_of(path: Path, jobs: int = 200) -> bytes:
    with Journal(path) as journal:
        for number in range(jobs):
            journal.submit(f"job-{number}", "search", "check", "x" * 200)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 100, 1_000, 4_096, 0.5, 0.99])
def test_a_file_cut_short_is_one_clear_error_and_stays_as_it_is(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "j.db"
    whole = journal_of(path)
    size = int(keep * len(whole)) if isinstance(keep, float) else keep
    path.write_bytes(whole[:size])
    with pytest.raises(JournalError, match=r"j\.db: the journal is damaged or cut short; move it away") as raised:
        Journal(path)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == whole[:size]


def test_another_version_or_another_program_is_one_clear_error(tmp_path: Path) -> None:
    journal_of(tmp_path / "j.db", 1)
    db = sqlite3.connect(tmp_path / "j.db")
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(
        JournalError, match=rf"journal version {VERSION + 1}, this program writes {VERSION}; finish its"
    ):
        Journal(tmp_path / "j.db")
    (tmp_path / "text").write_text("not a database at all " * 100)
    with pytest.raises(JournalError, match="damaged or cut short"):
        Journal(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(JournalError, match=r"other\.db: not a SpecGen journal; move it away"):
        Journal(tmp_path / "other.db")


def test_a_folder_that_is_missing_or_a_journal_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be created: No such file or directory; choose a folder"):
        Journal(tmp_path / "absent" / "j.db")
    with pytest.raises(JournalError):
        Journal(tmp_path)

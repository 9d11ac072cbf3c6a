"""The job journal: one SQLite file that says of every job whether it waits, runs or is over, across crashes.

A job is over once. A process that dies leaves its jobs `running`; recover() gives them back to be retried, or reports
them when they have been tried often enough. Each start hands out an attempt number, and only the latest attempt may
finish a job, so a worker that was taken for dead cannot add a second outcome.

Write-ahead log with synchronous=NORMAL: a killed process loses nothing that was committed; a machine that loses power
may lose the last commits, but not the file. A log (-wal) cut short by that is not told from a clean one.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import SpecGenError

APPLICATION_ID = 0x53504543
VERSION = 1
BUSY_S = 10.0
STATES = ("queued", "running", "finished", "reported")

_SCHEMA = f"""
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    search TEXT NOT NULL,
    stage TEXT NOT NULL,
    payload TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN {STATES}),
    attempt INTEGER NOT NULL DEFAULT 0,
    owner TEXT,
    outcome TEXT,
    submitted REAL NOT NULL,
    ended REAL,
    CHECK ((state IN ('finished', 'reported')) = (outcome IS NOT NULL))
) WITHOUT ROWID;
CREATE INDEX open_jobs ON jobs (state) WHERE state IN ('queued', 'running');
"""


class JournalError(SpecGenError, RuntimeError):
    """A journal that cannot be used; the message names the file, what is wrong with it and what to do."""


class Entry(NamedTuple):
    """A job as the journal knows it. attempt: starts so far.  outcome: None until it is over."""

    id: str
    search: str
    stage: str
    payload: str
    state: str
    attempt: int
    outcome: str | None


class Recovered(NamedTuple):
    """retry: queued again.  reported: over now, because their last attempt died too."""

    retry: tuple[Entry, ...]
    reported: tuple[Entry, ...]


class Journal:
    """Open with Journal(path); several processes may have it open. Not for use by several threads at once.

    Raises JournalError when the file is not a journal, is of another version, or is cut short.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            _create(self.path)
        self._open()

    @classmethod
    def in_memory(cls) -> Journal:
        """One that ends with this process, for a pool whose jobs nobody would ask for afterwards."""
        journal = cls.__new__(cls)
        journal.path = Path(":memory:")
        journal._db = sqlite3.connect(":memory:", isolation_level=None)
        journal._db.executescript(_SCHEMA)
        return journal

    def _open(self) -> None:
        with self._clear():
            if self.path.stat().st_size < 512:
                raise JournalError(f"{self._cut()} ({self.path.stat().st_size} bytes)")
            self._db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
            try:
                self._check()
            except BaseException:
                self._db.close()
                raise

    def submit(self, job: str, search: str, stage: str, payload: str = "") -> None:
        """A job is queued from now on, whatever dies. Raises ValueError when its id is taken."""
        with self._clear():
            try:
                self._db.execute(
                    "INSERT INTO jobs (id, search, stage, payload, state, submitted) VALUES (?, ?, ?, ?, 'queued', ?)",
                    (job, search, stage, payload, time.time()),
                )
            except sqlite3.IntegrityError:
                raise ValueError(f"job={job!r}: the journal has it already; ids are used once") from None

    def start(self, job: str, owner: str) -> int | None:
        """Take a queued job; returns the attempt number to finish it with, None when it does not wait (any more)."""
        with self._clear():
            row = self._db.execute(
                "UPDATE jobs SET state = 'running', owner = ?, attempt = attempt + 1 "
                "WHERE id = ? AND state = 'queued' RETURNING attempt",
                (owner, job),
            ).fetchone()
        return None if row is None else int(row[0])

    def finish(self, job: str, attempt: int, outcome: str) -> bool:
        """Record the outcome of a running job, once; False, and nothing changed, when this attempt no longer counts."""
        with self._clear():
            done = self._db.execute(
                "UPDATE jobs SET state = 'finished', outcome = ?, ended = ? "
                "WHERE id = ? AND state = 'running' AND attempt = ?",
                (outcome, time.time(), job, attempt),
            )
        return done.rowcount == 1

    def report(self, job: str, outcome: str) -> bool:
        """End a job without a result (cancelled, past its deadline); False when it is over already or unknown."""
        with self._clear():
            done = self._db.execute(
                "UPDATE jobs SET state = 'reported', outcome = ?, ended = ? "
                "WHERE id = ? AND state IN ('queued', 'running')",
                (outcome, time.time(), job),
            )
        return done.rowcount == 1

    def recover(self, owner: str | None = None, *, tries: int = 2, outcome: str = "crash") -> Recovered:
        """After the death of owner (None: of all): its running jobs wait again, or after `tries` starts are over."""
        mine = "state = 'running' AND (? IS NULL OR owner = ?)"
        with self._clear(), self._transaction():
            lost = self._entries(f"{mine} AND attempt >= ?", owner, owner, tries)
            again = self._entries(f"{mine} AND attempt < ?", owner, owner, tries)
            self._db.executemany(
                "UPDATE jobs SET state = 'reported', outcome = ?, ended = ? WHERE id = ?",
                [(outcome, time.time(), entry.id) for entry in lost],
            )
            self._db.executemany(
                "UPDATE jobs SET state = 'queued', owner = NULL WHERE id = ?", [(entry.id,) for entry in again]
            )
        return Recovered(
            tuple(entry._replace(state="queued") for entry in again),
            tuple(entry._replace(state="reported", outcome=outcome) for entry in lost),
        )

    def entry(self, job: str) -> Entry | None:
        with self._clear():
            found = self._entries("id = ?", job)
        return found[0] if found else None

    def waiting(self) -> list[Entry]:
        """Queued jobs, oldest first."""
        with self._clear():
            return self._entries("state = 'queued'")

    def counts(self) -> dict[str, int]:
        """Jobs by state; every job is in one."""
        with self._clear():
            found = dict(self._db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def forget(self, older_than_s: float) -> int:
        """Delete jobs that were over that many seconds ago; returns how many."""
        with self._clear():
            return self._db.execute("DELETE FROM jobs WHERE ended < ?", (time.time() - older_than_s,)).rowcount

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entries(self, where: str, *values: object) -> list[Entry]:
        columns = ", ".join(Entry._fields)
        rows = self._db.execute(f"SELECT {columns} FROM jobs WHERE {where} ORDER BY submitted, id", values)
        return [Entry(*row) for row in rows]

    def _check(self) -> None:
        """The version is read before anything is trusted, the whole file is checked before anything is written."""
        if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise JournalError(f"{self.path}: not a SpecGen journal; move it away or choose another path")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise JournalError(
                f"{self.path}: journal version {version}, this program writes {VERSION}; "
                "finish its jobs with the program that wrote it, or move it away"
            )
        if self._db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise JournalError(self._cut())
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")

    def _cut(self) -> str:
        return f"{self.path}: the journal is damaged or cut short; move it away to start a new one, or restore a copy"

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "disk image is malformed" in str(error):
                raise JournalError(self._cut()) from error
            raise JournalError(f"{self.path}: {error}; see that it can be written and its disk has room") from error
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise JournalError(f"{self._cut()} ({error})") from error
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}; see that it is a file that can be written") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _create(path: Path) -> None:
    """A whole journal appears under its name, or none does; of two processes that create it, both use the first."""
    try:
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(number)
    except OSError as error:
        raise JournalError(
            f"{path}: cannot be created: {error.strerror}; choose a folder that can be written"
        ) from error
    try:
        db = sqlite3.connect(name, isolation_level=None)
        try:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {VERSION}")
            db.executescript(_SCHEMA)
        finally:
            db.close()
        try:
            os.link(name, path)
        except FileExistsError:
            pass
    finally:
        os.unlink(name)

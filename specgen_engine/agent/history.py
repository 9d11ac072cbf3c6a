"""The history of a run in SQLite: what was asked, answered and judged, and the seconds it took.

Each step of an iteration is committed before the next begins, so a killed run loses only the step it was in.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from specgen_engine.agent.base import AgentError, Attempt

VERSION = 1
APPLICATION_ID = 0x5347454E  # "SGEN"
TABLES = (
    "CREATE TABLE run (id INTEGER PRIMARY KEY CHECK (id = 1), task_hash TEXT NOT NULL, settings TEXT NOT NULL,"
    " seconds REAL NOT NULL, created REAL NOT NULL)",
    "CREATE TABLE attempts (search INTEGER NOT NULL, iteration INTEGER NOT NULL, row TEXT NOT NULL,"
    " PRIMARY KEY (search, iteration))",
)


class History:
    """Owned by one process at a time; the lock goes with its owner, however that ends.

    Raises AgentError when the file is another program's, of another version, of another task, or in use.
    """

    def __init__(self, path: Path, task_hash: str, settings: dict[str, Any]) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock", mode=0o600)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AgentError(
                f"history {path}: in use by another run; wait for it, or name another with --out"
            ) from None
        try:
            self._open(task_hash, settings)
        except BaseException:
            self._lock.release()
            raise
        self._resumed = self.seconds()
        self._started = time.monotonic()

    def _open(self, task_hash: str, settings: dict[str, Any]) -> None:
        fresh = not self.path.exists() or not self.path.stat().st_size
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA synchronous=FULL")
            if fresh:
                self._create(task_hash, settings)
            self._require(task_hash)
        except sqlite3.DatabaseError as error:
            raise AgentError(
                f"history {self.path}: not a usable history ({error}); move it away or name another with --out"
            ) from None

    def _create(self, task_hash: str, settings: dict[str, Any]) -> None:
        """All of it or nothing: a run killed here starts afresh."""
        row = (task_hash, json.dumps(settings, sort_keys=True), time.time())
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version={VERSION}")
        for table in TABLES:
            self._db.execute(table)
        self._db.execute("INSERT INTO run VALUES (1, ?, ?, 0, ?)", row)
        self._db.execute("COMMIT")

    def _require(self, task_hash: str) -> None:
        if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise AgentError(f"history {self.path}: not written by specgen optimize; name another with --out")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise AgentError(
                f"history {self.path}: version {version}, this program writes {VERSION}; name another with --out"
            )
        (known,) = self._db.execute("SELECT task_hash FROM run").fetchone()
        if known != task_hash:
            raise AgentError(
                f"history {self.path}: of another task ({known}, this one is {task_hash}); name another with --out"
            )

    def attempts(self) -> list[Attempt]:
        """By search and iteration; the last of a search may be without its verdict."""
        rows = self._db.execute("SELECT row FROM attempts ORDER BY search, iteration").fetchall()
        return [Attempt.from_dict(json.loads(row[0])) for row in rows]

    def save(self, attempt: Attempt) -> None:
        """Insert or replace an attempt; the run's seconds go with it."""
        row = (attempt.search, attempt.iteration, json.dumps(attempt.to_dict(), allow_nan=False))
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?, ?)", row)
        self._db.execute("UPDATE run SET seconds = ?", (self.now(),))
        self._db.execute("COMMIT")

    def seconds(self) -> float:
        return float(self._db.execute("SELECT seconds FROM run").fetchone()[0])

    def now(self) -> float:
        """Seconds that the run has been up, over all its starts."""
        return round(self._resumed + time.monotonic() - self._started, 4)

    def close(self) -> None:
        self._db.execute("UPDATE run SET seconds = ?", (self.now(),))
        self._db.close()
        self._lock.release()

"""The burst on a live local pool while candidates, judges, workers and the server itself are killed at random."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from specgen_engine.evaluation.base import Status
from specgen_engine.pools.journal import Journal
from tests.pools.burst import KILLED, burst
from tests.pools.burst_server import CANCELLED_SEARCH

ROOT = Path(__file__).parents[2]
END = "end of output"


class Life:
    """One life of the server process, its words as they come."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.pools.burst_server", str(folder / "journal.db"), str(folder / "builds")]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        self.words: queue.Queue[str] = queue.Queue()
        self.said: list[list[str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.words.put(line)
        self.words.put(END)

    def hear(self, until: str, seconds: float = 200.0) -> bool:
        """Take words until one begins so; False when the process ended before."""
        stop = time.monotonic() + seconds
        while True:
            line = self.words.get(timeout=max(0.0, stop - time.monotonic()))
            if line == END:
                return False
            self.said.append(line.split(maxsplit=2))
            if line.startswith(until):
                return True

    def hear_ends(self, count: int) -> bool:
        return all(self.hear("end") for _ in range(count))

    def below(self, depth: int) -> list[psutil.Process]:
        """Descendants: at depth 1 the workers, below them judges and candidates."""
        workers = psutil.Process(self.process.pid).children()
        if depth == 1:
            return workers
        return [child for worker in workers for child in worker.children(recursive=True)]


def kill_one(processes: list[psutil.Process], rng: random.Random) -> int:
    """SIGKILL for one of them that still lives; how many were killed."""
    for process in rng.sample(processes, len(processes)):
        try:
            process.send_signal(signal.SIGKILL)
            return 1
        except psutil.NoSuchProcess:
            continue
    return 0


@pytest.mark.timeout(280)
def test_whatever_is_killed_each_job_ends_once_and_journal_and_memory_agree(tmp_path: Path) -> None:
    rng = random.Random(7)
    kills: Counter[str] = Counter()
    lives: list[Life] = []
    done = False
    for life_number in range(4):
        life = Life(tmp_path)
        lives.append(life)
        assert life.hear("ready")
        if life_number == 0:
            assert life.hear_ends(rng.randrange(20, 30))
            kills["worker"] += kill_one(life.below(1), rng)
            assert life.hear_ends(rng.randrange(10, 20))
            kills["child"] += kill_one(life.below(2), rng)
            assert life.hear_ends(rng.randrange(10, 60))
            life.process.send_signal(signal.SIGKILL)
            kills["server"] += 1
        while life.hear(""):
            pass
        assert life.process.wait(30) == (-signal.SIGKILL if life_number == 0 else 0)
        if ["done"] in life.said:
            done = True
            break
    assert done
    assert kills == {"worker": 1, "child": 1, "server": 1}
    check_ends(tmp_path / "journal.db", [life.said for life in lives], server_kills=kills["server"])
    check_last_snapshot(lives[-1].said)
    for life in lives:
        assert not psutil.pid_exists(life.process.pid)


def check_ends(path: Path, lives: list[list[list[str]]], server_kills: int) -> None:
    expected = {job.id: job for job in burst()}
    told = [(words[1], Status(words[2].strip())) for said in lives for words in said if words[0] == "end"]
    assert max(Counter(name for name, _ in told).values()) == 1, "an outcome was told twice"
    with Journal(path) as journal:
        counts = journal.counts()
        entries = {name: journal.entry(name) for name in expected}
    assert (counts["queued"], counts["running"]) == (0, 0)
    assert counts["finished"] + counts["reported"] == len(expected), "lost, or there twice"
    outcomes = {name: Status(json.loads(str(entry.outcome))["status"]) for name, entry in entries.items() if entry}
    assert outcomes.keys() == expected.keys()
    assert [(name, status) for name, status in told if outcomes[name] is not status] == [], "journal and memory differ"
    untold = outcomes.keys() - {name for name, _ in told}
    assert len(untold) <= 2 * server_kills, "more than what two workers had in hand when the server died"
    other = {name: status for name, status in outcomes.items() if status is not expected[name].expected}
    assert set(other.values()) <= KILLED
    cancelled = {name for name, status in other.items() if status is Status.CANCELLED}
    assert cancelled, "the search that ended had jobs left"
    assert {expected[name].search for name in cancelled} == {CANCELLED_SEARCH}
    assert len(other) - len(cancelled) <= 6, other


def check_last_snapshot(said: list[list[str]]) -> None:
    ends = Counter(words[2].strip() for words in said if words[0] == "end")
    resumed = next(words for words in said if words[0] == "resumed")
    ends.subtract({"crash": int(resumed[2])})  # those were reported before the pool began
    snapshot = json.loads(next(" ".join(words[1:]) for words in said if words[0] == "snapshot"))
    assert snapshot["finished"] == {status: count for status, count in ends.items() if count}
    assert (snapshot["queued"], snapshot["busy"]) == (0, 0)
    assert snapshot["seconds"]["total"] == pytest.approx(snapshot["seconds"]["by_search"])
    assert snapshot["gpu_seconds"]["useful"] > 0
    assert all(0 < share < 1 for share in snapshot["utilisation"].values())

"""A storm of searches, aborts and disconnects leaves a server as it was: tokens, processes, files, sockets."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.engine.conftest import BUNDLED, TASK, Client, StartServer

QUIET_S = 90
OTHER_TASK = TASK + "\n# not recorded\n"
ENDINGS = ("whole", "whole", "stream", "disconnect", "disconnect", "abort", "abort", "plain")


@dataclass(frozen=True)
class State:
    """What must be the same before and after: free KV, and all that the server's processes hold."""

    free_tokens: int
    processes: Counter[str]
    descriptors: Counter[str]
    sockets: Counter[str]
    files: frozenset[str]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def server(start_server: StartServer, scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    cache = str(tmp_path_factory.mktemp("builds"))
    patch = pytest.MonkeyPatch()
    patch.setenv("TMPDIR", str(scratch))
    options = ("--specgen-fork-total", "12", "--max-total-tokens", "16384", "--specgen-evaluation-cache", cache)
    with start_server("--tiny", "--replay", str(BUNDLED), *options) as client:
        patch.undo()
        yield client


def scheduler_state(client: Client) -> dict[str, Any]:
    return client.get("/server_info").json()["internal_states"][0]["specgen"]


def family(client: Client) -> list[psutil.Process]:
    root = psutil.Process(client.server.pid)
    return [root, *root.children(recursive=True)]


def wait_quiet(client: Client) -> None:
    """Until no search runs, no request is left in the engine and no worker judges; fails after QUIET_S."""
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        searches = client.get("/specgen/searches").json()
        running = [row["id"] for row in searches["searches"] if row["state"] != "ended"]
        state = scheduler_state(client)
        if not running and not state["watched"] and not state["scripts"] and client.post("/flush_cache").is_success:
            return
        time.sleep(0.2)
    pytest.fail(f"not quiet: searches {running}, scheduler {state}")


def state_of(client: Client, scratch: Path) -> State:
    processes = family(client)
    sockets = Counter(one.status for process in processes for one in process.net_connections(kind="tcp"))
    files = frozenset(str(path.relative_to(scratch)) for path in scratch.rglob("*"))
    return State(
        free_tokens=scheduler_state(client)["free_tokens"],
        processes=Counter(process.name() for process in processes),
        descriptors=Counter(one for process in processes for one in descriptors_of(process)),
        sockets=sockets,
        files=files,
    )


def descriptors_of(process: psutil.Process) -> list[str]:
    """What a process holds open, by kind: numbers in names are left out, so that like ones count together."""
    found = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(f"{process.name()}: {re.sub(r'[0-9]+', 'N', os.readlink(entry))}")
    return found


def specgen_of(pick: random.Random) -> dict[str, Any]:
    return {
        "task": pick.choice((TASK, OTHER_TASK)),
        "trigger": pick.choice(("every:7", "every:31", "paragraph:min=5", "fence", "every:11 + fence")),
        "termination": pick.choice(("none", "correct", "plateau:3", "best_of:2")),
        "fork": {"max_tokens": pick.choice((4, 12, 40))},
    }


def one_request(client: Client, seed: int) -> str:
    """One random request, ended in a random way; returns how it ended."""
    pick = random.Random(seed)
    ending = pick.choice(ENDINGS)
    specgen = None if ending == "plain" else specgen_of(pick)
    options = {"max_tokens": pick.choice((12, 40, 90)), "temperature": pick.choice((0, 1.0))}
    prompt = f"{seed}: " + "river " * pick.randrange(1, 200)
    if ending in ("whole", "plain"):
        client.chat(prompt, specgen, **options)
        return ending
    stop_at = pick.randrange(1, 12)
    with client.chat(prompt, specgen, stream=True, **options) as stream:
        for number, chunk in enumerate(stream):
            if number == stop_at and ending == "disconnect":
                return ending
            if number == stop_at and ending == "abort":
                client.post("/abort_request", {"rid": chunk.id})
    return ending


def storm(client: Client, requests: int) -> Counter[str]:
    """Sixteen clients at once; an abort that reaches the client as an error is an answer."""

    def run(seed: int) -> str:
        try:
            return one_request(client, seed)
        except (openai.APIError, httpx.HTTPError) as error:
            return type(error).__name__

    with ThreadPoolExecutor(16) as threads:
        return Counter(threads.map(run, range(requests)))


def check_storm(client: Client, scratch: Path, requests: int) -> None:
    storm(client, 8)  # warm: the worker, the judge's modules and the thread pools are there from here on
    wait_quiet(client)
    gc.collect()
    time.sleep(6)  # longer than the server keeps an idle connection
    before = state_of(client, scratch)
    endings = storm(client, requests)
    assert endings.total() == requests
    assert {"whole", "stream", "disconnect", "abort", "plain"} <= endings.keys()
    assert not endings.keys() & {"InternalServerError", "APIConnectionError", "APITimeoutError"}, endings
    searches = client.get("/specgen/searches").json()["searches"]
    assert sum(row["forks"] for row in searches) > requests // 4
    wait_quiet(client)
    gc.collect()  # this process's own idle clients hold connections open
    deadline = time.monotonic() + 60  # closed sockets and judged candidates leave a moment later
    while (after := state_of(client, scratch)) != before and time.monotonic() < deadline:
        time.sleep(0.5)
    assert after == before, after.descriptors - before.descriptors
    assert client.chat("still there?", max_tokens=4).usage.completion_tokens == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_four_requests_leave_nothing_behind(server: Client, scratch: Path) -> None:
    check_storm(server, scratch, 24)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_requests_leave_nothing_behind(server: Client, scratch: Path) -> None:
    check_storm(server, scratch, 200)

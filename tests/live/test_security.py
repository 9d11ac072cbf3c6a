"""Keys, and whose processes other people's code runs in, on a real server (docs/security.md states what is refused)."""

from __future__ import annotations

import json
import os
import re

import openai
import pytest

from specgen_engine.evaluation import sandbox
from tests.live.conftest import ADMIN, KEY, SEARCH, Live
from tests.live.recording import TASK, reach

# What code of others reaches at each level, of: read, socket, processes, write, signal, scratch.
REACHED = {
    sandbox.FULL: {"scratch"},
    sandbox.KERNEL: {"scratch", "processes"},
    sandbox.PROCESS: {"read", "socket", "processes", "write", "signal", "scratch"},
}


def check(live: Live, said: str, level: str) -> None:
    """The process that ran it is none of the server's, holds nothing of SGLang, and reached what its level allows."""
    found = re.search(r"reaches=(\S*) pid=(\d+) ns=(\S+) server=(\w+)", said)
    assert found is not None, said
    assert set(found[1].split(",")) <= REACHED[level], said
    elsewhere = found[3] != os.readlink(f"/proc/{live.server.pid}/ns/pid")
    assert elsewhere or int(found[2]) not in live.pids
    assert found[4] == "False"
    if level == sandbox.FULL:
        assert elsewhere


def test_the_reference_runs_in_the_same_cage_as_candidates_and_none_in_the_server(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        live.chat({"task": reach(live.secret, live.server.log, os.getpid()) + TASK})
    assert "specgen.task" in str(error.value)
    level = str(live.get("/specgen/searches").json()["pool"]["sandbox"])
    check(live, str(error.value), level)
    record = live.search()
    hostile = [one for one in record["candidates"] if "reaches=" in one["reason"]]
    assert [one["status"] for one in hostile] == ["compile_error"]
    assert hostile[0]["sandbox"] == level
    check(live, hostile[0]["reason"], level)
    assert live.still_runs()


@pytest.mark.parametrize("path", ["/specgen/searches", "/specgen/events?follow=false", "/specgen/"])
def test_every_searchs_routes_want_the_admin_key(live: Live, path: str) -> None:
    assert [live.get(path, key).status_code for key in (None, KEY, ADMIN)] == [401, 401, 200]


@pytest.mark.parametrize("path", ["/specgen/searches/none", "/specgen/openapi.json"])
def test_one_searchs_routes_want_the_api_key(live: Live, path: str) -> None:
    wanted = 200 if path.endswith("json") else 404
    assert [live.get(path, key).status_code for key in (None, KEY)] == [401, wanted]


def test_a_path_is_read_only_under_a_root(live: Live) -> None:
    for path in (str(live.secret), "/etc/passwd", f"{live.secret.parent}/rows/../secret"):
        with pytest.raises(openai.BadRequestError, match=r"specgen\.task: .*outside the folders"):
            live.chat(json.dumps({**SEARCH, "task": path}))
    given = live.chat(
        {"task": f"{live.secret.parent}/rows/task.py", "trigger": "none", "termination": "none"}, max_tokens=4
    )
    assert given.model_dump()["sglext"]["specgen"]["trace"] == "rows"

"""A phase of bench.end_to_end goes on where one of its searches does not."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import BadRequestError

from bench import e2e_searches
from bench.e2e_configurations import CONFIGURATIONS
from bench.e2e_searches import Limits, Play

REFUSED = BadRequestError(
    "custom_params.specgen.task: no memory",
    response=httpx.Response(400, request=httpx.Request("POST", "http://engine")),
    body=None,
)


def phase(chains: list[list[str]], fails: dict[str, Exception]) -> tuple[list[str], dict[str, str]]:
    """What was played, and why the rest was not."""
    played, left = list[str](), dict[str, str]()

    async def one(play: Any) -> None:
        if play.name in fails:
            raise fails[play.name]
        played.append(play.name)

    async def session() -> None:
        plays: Any = [[SimpleNamespace(name=name) for name in chain] for chain in chains]
        note: Any = lambda play, why: left.__setitem__(play.name, why)  # noqa: E731
        await e2e_searches._play(plays, one, asyncio.Semaphore(1), Limits(1, math.inf, lambda play: None, note))

    asyncio.run(session())
    return played, left


def test_a_search_that_the_server_refuses_costs_its_own_chain_only() -> None:
    played, left = phase([["a1", "a2", "a3"], ["b1"]], {"a2": REFUSED})
    assert played == ["a1", "b1"]
    assert list(left) == ["a2", "a3"]
    assert "no memory" in left["a2"]


def test_a_fault_of_the_bench_ends_it() -> None:
    with pytest.raises(ZeroDivisionError):
        phase([["a1"], ["b1"]], {"a1": ZeroDivisionError()})


def test_a_search_asks_for_what_its_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()

    async def create(**request: Any) -> Any:
        asked.append(json.loads(request["extra_body"]["custom_params"]["specgen"]))
        return SimpleNamespace(model_dump=lambda: {"sglext": {"specgen": {}}})

    monkeypatch.setattr(e2e_searches, "row_of", lambda play, record, seconds: {})
    client: Any = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    trace: Any = SimpleNamespace(task_source="class Model: ...", name="t")
    for name in ("new-code-no-repeats", "specgen"):
        search = CONFIGURATIONS[name].search("speedup:1.5")
        asyncio.run(e2e_searches.play_one(client, Play(trace, SimpleNamespace(number=2), search)))  # type: ignore[arg-type]
    assert asked[0] == {
        "task": "class Model: ...", "name": "t", "iteration": 2, "trigger": "paragraph:min=800:new=code",
        "termination": "speedup:1.5", "fork": {"end_repeats": 0.0},
    }  # fmt: skip
    assert "fork" not in asked[1]

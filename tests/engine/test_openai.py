"""The openai package against a replaying server: sync, async, streaming; with and without custom_params; bad input."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.replay.trace import load_traces
from tests.engine.conftest import BUNDLED, TASK, Client, StartServer

RECORDED = load_traces([BUNDLED])[0].iterations[0]
PROMPT = f"Make this faster.\n\n```python\n{TASK}\n```"
SEARCH = {"task": TASK, "trigger": "every:300", "termination": "correct"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
LONG = {"max_tokens": 8000}


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    cache = str(tmp_path_factory.mktemp("builds"))
    arguments = ["--tiny", "--replay", str(BUNDLED), "--reasoning-parser", "deepseek-r1", "--enable-metrics"]
    share = ("--specgen-scheduler-base-share", "0.25")
    with start_server(*arguments, *share, "--specgen-evaluation-cache", cache) as client:
        client.chat(PROMPT, SEARCH, **LONG)  # compiles the first candidate: later verdicts take seconds
        yield client


def check_graft(reasoning: str, content: str, report: dict[str, Any]) -> None:
    assert report["ended_by"] == "criterion"
    assert report["accepted"]["source"] == "fork"
    assert RECORDED.reasoning.startswith(reasoning.strip()[:2000])
    assert len(reasoning) < len(RECORDED.reasoning)
    assert "</think>" not in content
    assert extract_candidate(content) == extract_candidate(RECORDED.forks[1])
    judged = [c for c in report["candidates"] if c["status"] == "correct"]
    assert [c["hash"] for c in judged] == [report["accepted"]["hash"]]
    made = [fork for fork in report["forks"] if fork["state"] == "stop"]
    assert made
    for fork in made:
        assert fork["prefix_reused"] >= 0.99 * (fork["prompt_tokens"] + fork["at_token"])
        assert fork["prefix_reused"] + fork["prefix_computed"] > fork["prompt_tokens"] + fork["at_token"]


def test_a_plain_answer_is_grafted(server: Client) -> None:
    answer = server.chat(PROMPT, SEARCH, **LONG).model_dump()
    (choice,) = answer["choices"]
    report = answer["sglext"]["specgen"]
    check_graft(choice["message"]["reasoning_content"], choice["message"]["content"], report)
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == report["prompt_tokens"]
    assert usage["completion_tokens"] == report["reasoning_tokens"] + report["answer_tokens"]
    assert report["tokens"]["fork"] == sum(fork["tokens"] for fork in report["forks"])
    assert server.get(f"/specgen/searches/{report['id']}").json()["accepted"] == report["accepted"]


def test_a_streamed_answer_is_grafted_and_the_report_comes_last(server: Client) -> None:
    reasoning, content, report, finish, reasoning_chunks = "", "", None, None, 0
    for chunk in server.chat(PROMPT, SEARCH, stream=True, stream_options={"include_usage": True}, **LONG):
        data = chunk.model_dump()
        assert report is None, "a chunk came after the report"
        report = (data.get("sglext") or {}).get("specgen") or report
        for choice in data["choices"]:
            reasoning += choice["delta"].get("reasoning_content") or ""
            reasoning_chunks += bool(choice["delta"].get("reasoning_content"))
            content += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    assert report is not None
    check_graft(reasoning, content, report)
    assert finish == "stop"
    assert reasoning_chunks > 100


def test_async_client_without_custom_params_is_served_as_ever(server: Client) -> None:
    async def ask() -> Any:
        client = openai.AsyncOpenAI(base_url=f"{server.server.url}/v1", api_key="none", timeout=120)
        return await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )

    answer = asyncio.run(ask()).model_dump()
    assert answer["usage"]["completion_tokens"] == 8
    assert "sglext" not in answer or answer["sglext"] is None


def test_async_streaming_client_with_a_search(server: Client) -> None:
    async def ask() -> str:
        client = openai.AsyncOpenAI(base_url=f"{server.server.url}/v1", api_key="none", timeout=300)
        stream = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": PROMPT}],
            stream=True,
            max_tokens=8000,
            extra_body={"custom_params": {"specgen": json.dumps(SEARCH)}},
        )
        return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

    assert extract_candidate(asyncio.run(ask())) == extract_candidate(RECORDED.forks[1])


def test_an_object_is_as_good_as_its_json_string(server: Client) -> None:
    body = {"custom_params": {"specgen": {"task": TASK, "trigger": "none", "termination": "none"}}}
    answer = server.openai.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "short"}], max_tokens=4, extra_body=body
    )
    assert answer.model_dump()["sglext"]["specgen"]["trigger"] == "none"


@pytest.mark.parametrize(
    ("specgen", "options", "says"),
    [
        ({"taks": "x"}, {}, "specgen.taks"),
        ({"task": "import nowhere_at_all\n" + TASK}, {}, "specgen.task"),
        ({"task": "x = 1\n"}, {}, "specgen.task"),
        ({"task": "/etc/passwd"}, {}, "specgen.task"),
        ({**SEARCH, "termination": "speedup:-3"}, {}, "specgen.termination"),
        ({**SEARCH, "trigger": "every:0"}, {}, "specgen.trigger"),
        ({**SEARCH, "iteration": 7}, {}, "specgen.iteration"),
        (SEARCH, {"n": 2}, "not with n above 1"),
        (SEARCH, {"logprobs": True}, "not with logprobs"),
        (SEARCH, {"response_format": SCHEMA}, "not with structured output"),
        (SEARCH, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "not with tools"),
    ],
)  # fmt: skip
def test_bad_input_is_a_400_that_names_the_field(
    server: Client, specgen: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.chat("hello", specgen, **options)
    assert says in str(error.value)
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("options", [{"n": 2}, {"logprobs": True}, {"stream": True}])
def test_requests_that_do_not_name_specgen_behave_as_ever(server: Client, options: dict[str, Any]) -> None:
    answer = server.chat("hello", False, max_tokens=4, **options)
    if options.get("stream"):
        assert all("specgen" not in (chunk.model_dump().get("sglext") or {}) for chunk in answer)
    else:
        assert len(answer.choices) == options.get("n", 1)


def test_other_routes_refuse_specgen_and_serve_the_rest(server: Client) -> None:
    body = {"model": "m", "prompt": "hello", "max_tokens": 4}
    assert server.post("/v1/completions", body).status_code == 200
    named = server.post("/v1/completions", {**body, "custom_params": {"specgen": json.dumps(SEARCH)}})
    assert named.status_code == 400
    assert "use /v1/chat/completions" in named.text


def test_a_running_search_is_forked_on_demand(server: Client) -> None:
    stream = server.chat(PROMPT, {**SEARCH, "trigger": "none", "termination": "none"}, stream=True, **LONG)
    asked: list[int] = []
    for number, chunk in enumerate(stream):
        if number in (5, 700):
            search = chunk.id
            asked.append(server.post(f"/specgen/searches/{search}/fork").json()["length"])
        if number == 1500:
            break
    stream.close()
    report = server.get(f"/specgen/searches/{search}").json()
    assert [fork["trigger"] for fork in report["forks"]] == ["asked", "asked"]
    for fork, length in zip(report["forks"], asked, strict=True):
        assert fork["prompt_tokens"] + fork["at_token"] == length
        assert length - 2 <= fork["prefix_inserted"] <= length
    assert server.post("/specgen/searches/none/fork").status_code == 404
    for _ in range(100):
        if server.post(f"/specgen/searches/{search}/fork").status_code in (404, 409):
            break
        time.sleep(0.2)
    else:
        pytest.fail("an ended search was forked")


def test_entropy_forks_and_its_log_probabilities_stay_inside(server: Client) -> None:
    """Random weights are unsure of every token, so each 200th is one to fork at."""
    options = {**SEARCH, "trigger": "entropy:0.5:min=200", "termination": "none"}
    stream = server.chat(PROMPT, options, stream=True, **LONG)
    for number, chunk in enumerate(stream):
        assert all(choice.logprobs is None for choice in chunk.choices)
        if number == 700:
            break
    stream.close()
    forks = server.get(f"/specgen/searches/{chunk.id}").json()["forks"]
    assert [(fork["trigger"], fork["at_token"]) for fork in forks[:3]] == [
        ("entropy:0.5:min=200", at) for at in (200, 400, 600)
    ]
    server.flush()


def test_a_client_that_leaves_cancels_its_search(server: Client) -> None:
    stream = server.chat(PROMPT, {**SEARCH, "termination": "none"}, stream=True, **LONG)
    for number, _ in enumerate(stream):
        if number == 400:
            break
    stream.close()
    newest: dict[str, Any] = {}
    for _ in range(150):
        newest = server.get("/specgen/searches").json()["searches"][-1]
        if newest["state"] == "ended":
            break
        time.sleep(0.2)
    assert newest["ended_by"] == "cancelled"
    server.flush()


def test_searches_and_metrics(server: Client) -> None:
    listing = server.get("/specgen/searches").json()
    assert listing["searches"]
    assert listing["pool"]["workers"] == 1
    assert server.get("/specgen/searches/none").status_code == 404
    metrics = server.get("/metrics").text
    for name in (
        "specgen_searches_total",
        "specgen_forks_total",
        "specgen_tokens_total",
        "specgen_verdict_seconds_bucket",
    ):
        assert name in metrics

"""Real weights (SmolLM2-135M, float32): the KV a fork reuses is right, and forks leave the base's tokens alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.conftest import TASK, Client, StartServer

PROMPTS = ("Tell me about rivers.", "Explain how a bicycle stays upright.", "Write a short story about a lighthouse.")
SEARCH = {"task": TASK, "trigger": "every:12", "termination": "none", "fork": {"max_tokens": 10}}
BASE_TOKENS = 56


def tokens_of(answer: Any, client: Client) -> tuple[list[int], list[dict[str, Any]], dict[str, Any]]:
    """(base ids, forks with ids, report) of a search once it is quiet."""
    report = answer.model_dump()["sglext"]["specgen"]
    for _ in range(100):
        full = client.get(f"/specgen/searches/{report['id']}?ids=true").json()
        if full["state"] == "ended":
            break
        time.sleep(0.1)
    return full["ids"]["base"], full["ids"]["forks"], full


def fork_and_recompute(client: Client, prompts: tuple[str, ...] = PROMPTS) -> int:
    """Every finished fork's tokens equal those of the same input on a flushed cache; returns how many were compared."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda prompt: client.chat(prompt, SEARCH, max_tokens=BASE_TOKENS), prompts))
    forks = []
    for answer in answers:
        _, found, report = tokens_of(answer, client)
        for ids, record in zip(found, report["forks"], strict=True):
            if record["state"] in ("stop", "length"):
                assert record["prefix_reused"] >= record["prompt_tokens"] + record["at_token"] - record["page_size"] - 1
                forks.append(ids)
    for fork in forks:
        client.flush()
        fresh = client.generate(fork["input_ids"], len(fork["output_ids"]))
        assert fresh["meta_info"]["cached_tokens"] == 0
        assert fresh["output_ids"] == fork["output_ids"]
    return len(forks)


@pytest.fixture(scope="module")
def smollm(start_server: StartServer) -> Iterator[Client]:
    with start_server("--smollm", "--specgen-fork-per-search", "8") as client:
        yield client


def test_reused_prefixes_give_the_tokens_of_a_flushed_cache(smollm: Client) -> None:
    assert fork_and_recompute(smollm) >= 6


def test_the_bases_tokens_are_the_same_with_the_flag_off_on_and_with_eight_forks(
    smollm: Client, start_server: StartServer
) -> None:
    prompt = PROMPTS[0]
    crowded = smollm.chat(prompt, {**SEARCH, "trigger": "every:4", "fork": {"max_tokens": 60}}, max_tokens=BASE_TOKENS)
    forked, _, report = tokens_of(crowded, smollm)
    assert most_at_once(report["forks"]) == 8
    plain_on = smollm.chat(prompt, max_tokens=BASE_TOKENS).choices[0].message.content
    with start_server("--smollm", specgen=False) as ordinary:
        plain_off = ordinary.chat(prompt, max_tokens=BASE_TOKENS)
        assert "specgen" not in (plain_off.model_dump().get("sglext") or {})
        assert ordinary.get("/specgen/searches").status_code == 404
        off = plain_off.choices[0].message.content
    assert plain_on == off
    assert crowded.choices[0].message.content == off
    assert len(forked) == BASE_TOKENS


def most_at_once(forks: list[dict[str, Any]]) -> int:
    """Largest number of forks in flight at one time."""
    edges = []
    for fork in forks:
        end = fork["finished_s"] if fork["finished_s"] is not None else float("inf")
        edges += [(fork["started_s"], 1), (end, -1)]
    level = highest = 0
    for _, change in sorted(edges):
        level += change
        highest = max(highest, level)
    return highest


def test_nothing_is_left_in_the_pool(smollm: Client) -> None:
    smollm.flush()
    before = smollm.get("/server_info").json()["internal_states"][0]["memory_usage"]
    smollm.chat(PROMPTS[1], SEARCH, max_tokens=BASE_TOKENS)
    time.sleep(1)
    smollm.flush()
    assert smollm.get("/server_info").json()["internal_states"][0]["memory_usage"] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--page-size", "16"),
        ("--page-size", "32"),
        ("--page-size", "64"),
        ("--disable-overlap-schedule",),
        ("--page-size", "16", "--disable-overlap-schedule"),
        ("--chunked-prefill-size", "32"),
    ],
    ids=" ".join,
)
def test_modes(start_server: StartServer, arguments: tuple[str, ...]) -> None:
    with start_server("--smollm", "--specgen-fork-per-search", "8", *arguments) as client:
        assert fork_and_recompute(client) >= 6

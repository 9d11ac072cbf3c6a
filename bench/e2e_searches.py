"""One phase of bench.end_to_end: every trace through the engine in one configuration, at most N searches at once."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from openai import APIStatusError, AsyncOpenAI

from bench.e2e_configurations import Configuration, Search
from specgen_engine.evaluation.buildcache import forget_builds
from specgen_engine.replay.command import MAX_TOKENS, chat_request
from specgen_engine.replay.trace import Iteration, Trace
from specgen_engine.tier.metrics import COUNTERS

TIMEOUT_S = 3_600
PAUSED = "engine_paused_s"
PROFILE_POLL_S = 0.2
# Of a candidate's record; texts are left out, so that a report stays small.
CANDIDATE = (
    "hash", "source", "submitted_s", "verdict_s", "status", "speedup", "interval", "candidate_ms", "reference_ms",
    "stages", "forks", "at_token", "order", "roofline", "sandbox", "device", "reason",
)  # fmt: skip
FORK = (
    "n", "trigger", "at_token", "started_s", "finished_s", "tokens", "state", "candidate", "prefix_reused",
    "prefix_computed",
)  # fmt: skip
SEARCH = (
    "wall_s", "reasoning_s", "reasoning_tokens", "recorded_reasoning_tokens", "answer_tokens", "fork_tokens",
    "forks_skipped", "ended_by", "reason", "accepted", "best", "final", "evaluation_s", "trigger", "termination",
)  # fmt: skip


class Play(NamedTuple):
    """One search to play."""

    trace: Trace
    iteration: Iteration
    search: Search


Save = Callable[[dict[str, Any]], None]
Whole = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
WhyNot = Callable[[Play], str | None]
"""Why a search is not started any more; None: start it."""
Leave = Callable[[Play, str], None]


class Limits(NamedTuple):
    """at_once: searches. deadline: monotonic seconds at which what still runs is given up."""

    at_once: int
    deadline: float
    why_not: WhyNot
    leave: Leave


async def play_phase(
    url: str, configuration: Configuration, chains: list[list[Play]], seed: int, limits: Limits, save: Save
) -> dict[str, Any]:
    """Play all chains, each one search after another; `save` gets each row as it ends, `limits.leave` what is not done.

    Returns the phase's row: its wall time, the evaluators' seconds and what the KV tier counted.
    """
    gate = asyncio.Semaphore(limits.at_once)
    ended = list[Play]()
    name = {"configuration": configuration.name, "seed": seed, "phase": int(time.time())}
    async with _openai(url) as client, httpx.AsyncClient(base_url=url, timeout=60) as http:
        await _flush(http)
        profiled = partial(until_profiled, http)
        before, counted, started = await gpu_seconds(http), await engine_counts(http), time.monotonic()

        async def one(play: Play) -> None:
            began = time.monotonic() - started
            row = await play_one(client, play, whole=profiled)
            ended.append(play)
            save(row | name | {"began_s": round(began, 3)})

        await _play(chains, one, gate, limits)
        wall, after = time.monotonic() - started, await gpu_seconds(http)
        engine = {what: value - counted.get(what, 0) for what, value in (await engine_counts(http)).items()}
    spent = {outcome: round(after.get(outcome, 0.0) - before.get(outcome, 0.0), 3) for outcome in after}
    return {
        **name, "searches": len(ended), "at_once": limits.at_once, "wall_s": round(wall, 3), "gpu_seconds": spent,
        "engine_paused_s": round(engine.pop(PAUSED, 0.0), 3), "kv": engine,
    }  # fmt: skip


async def _play(
    chains: list[list[Play]], one: Callable[[Play], Awaitable[None]], gate: asyncio.Semaphore, limits: Limits
) -> None:
    """A chain stops at the first that is not played or is refused: a later one's time would mean nothing."""
    left = [list(chain) for chain in chains]

    async def follow(chain: list[Play]) -> None:
        async with gate:
            while chain and (why := limits.why_not(chain[0])) is None:
                try:
                    await one(chain[0])
                except APIStatusError as error:
                    why = f"the server refused it: {error}"[:300]
                    break
                chain.pop(0)
            while chain:
                limits.leave(chain.pop(0), why or "")

    tasks = [asyncio.create_task(follow(chain)) for chain in left]
    seconds = None if math.isinf(limits.deadline) else max(0.0, limits.deadline - time.monotonic())
    ended, running = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for task in ended:
        task.result()
    for play in itertools.chain(*left):
        limits.leave(play, "it still ran when the budget was over")


async def play_one(
    client: AsyncOpenAI, play: Play, max_tokens: int = MAX_TOKENS, whole: Whole | None = None
) -> dict[str, Any]:
    """One chat request, as an agent sends it. whole: makes the answer's record the one that is kept."""
    started = time.monotonic()
    request = chat_request(play.trace, play.iteration, *play.search[:2], max_tokens, play.search.fork)
    answer = await client.chat.completions.create(**request)
    client_s = time.monotonic() - started
    search = answer.model_dump()["sglext"]["specgen"]
    return row_of(play, search if whole is None else await whole(search), client_s)


async def until_profiled(http: httpx.AsyncClient, search: Mapping[str, Any]) -> Mapping[str, Any]:
    """A search's record once no profile is on its way: the accepted candidate's may come after the answer."""
    while search["profiling"]:
        await asyncio.sleep(PROFILE_POLL_S)
        answer = await http.get(f"/specgen/searches/{search['id']}")
        answer.raise_for_status()
        search = answer.json()
    return search


def row_of(play: Play, search: Mapping[str, Any], client_s: float) -> dict[str, Any]:
    """What the report needs of a search's record. client_s: from the request to its answer, as the agent sees it."""
    row: dict[str, Any] = {
        "trace": play.trace.name,
        "group": play.trace.path.resolve().parent.name,
        "iteration": play.iteration.number,
        "client_s": round(client_s, 3),
        **{name: search[name] for name in SEARCH},
    }
    row["candidates"] = [
        {**{name: one[name] for name in CANDIDATE}, "profiled": bool(one["profile"]), "profile_s": one["profile_s"]}
        for one in search["candidates"]
    ]
    row["forks"] = [{name: one[name] for name in FORK} for one in search["forks"]]
    row["verdict_tokens"] = tokens_at_verdicts(search["decisions"])
    return row


def tokens_at_verdicts(decisions: list[Mapping[str, Any]]) -> list[int]:
    """Base and fork tokens that had been spent when the first, second, ... verdict was in."""
    found: list[int] = []
    for one in decisions:
        while len(found) < one["verdicts"]:
            found.append(one["tokens"])
    return found


async def warm_up(url: str, traces: list[Trace]) -> dict[str, int]:
    """Each task checked by an evaluator and its prompt read once: what every configuration is spared alike.

    Returns the tokens of each trace's first reasoning.
    """
    plays = [Play(trace, trace.iterations[0], Search("none", "none")) for trace in traces]
    async with _openai(url) as client:
        rows = await asyncio.gather(*(play_one(client, play, max_tokens=4) for play in plays))
    return {row["trace"]: row["recorded_reasoning_tokens"] for row in rows}


def _openai(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0)


def empty_cache(cache: Path) -> None:
    """Builds of an earlier configuration must not serve the next."""
    forget_builds(cache)


async def _flush(http: httpx.AsyncClient) -> None:
    answer = await http.post("/flush_cache")
    answer.raise_for_status()


async def gpu_seconds(http: httpx.AsyncClient) -> dict[str, float]:
    """The pool's account: seconds of check, timing and profile work by outcome, since the server's start."""
    answer = await http.get("/specgen/searches")
    answer.raise_for_status()
    return {name: float(value) for name, value in answer.json()["pool"].get("gpu_seconds", {}).items()}


async def engine_counts(http: httpx.AsyncClient) -> dict[str, float]:
    """Since the server's start: what a KV tier of ours counted, where there is one (HiCache counts elsewhere).

    Under PAUSED the seconds that the engine stood still for timed runs on its GPU, where it does.
    """
    answer = await http.get("/server_info")
    answer.raise_for_status()
    states = answer.json().get("internal_states") or [{}]
    counts = (states[0].get("specgen_kv") or {}).get("counts", {})
    pauses = (states[0].get("specgen") or {}).get("pauses")
    return {name: value for name, value in counts.items() if name in COUNTERS} | (
        {PAUSED: pauses["seconds"]} if pauses else {}
    )

"""A KV pool a third of what is asked: do forks cost the ordinary requests beside them anything?

    python -m bench.engine_starved --json bench/results/engine_starved_cpu.json

Real SGLang on the CPU engine with the tiny model, one server. A wave is two searches, and some tokens into
their reasoning a burst of ordinary requests that together with the searches and their forks ask for three times the
pool. Each pair plays the same waves twice, once with forks and once with the trigger off; which is first changes from
pair to pair. Counted by the scheduler: requests retracted, forks and ordinary ones (bases among these).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from bench.engine_servers import Wanted, together
from bench.machine import new_report, write_report
from bench.streamed_search import streamed_search
from specgen_engine.replay.trace import BUNDLED, load_traces

TASK = load_traces([BUNDLED])[0].task_source
SEARCHES, BASE_TOKENS, FORKS_A_SEARCH, FORK_TOKENS, TRIGGER = 2, 384, 2, 128, "every:16"
ORDINARY, PROMPT_TOKENS, NEW_TOKENS = 20, 96, 64
LEAD_TOKENS = 64
ASKED = SEARCHES * (BASE_TOKENS + 32 + FORKS_A_SEARCH * FORK_TOKENS) + ORDINARY * (PROMPT_TOKENS + NEW_TOKENS)
POOL = ASKED // 3


class Run(NamedTuple):
    """The waves of one arm. ttft_s: of each ordinary request, seconds; retractions by the scheduler's count."""

    ttft_s: list[float]
    ordinary_retracted: int
    forks_retracted: int
    forks: int

    @property
    def p95_s(self) -> float:
        return float(np.percentile(self.ttft_s, 95))


class Bench:
    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.client, self.url, self.served = client, url, 0

    async def counts(self) -> dict[str, int]:
        answer = await self.client.get(f"{self.url}/server_info")
        return dict(answer.json()["internal_states"][0]["specgen"])

    async def search(self, number: int, trigger: str, reasons: asyncio.Event) -> int:
        """One streamed search; `reasons` is set at its LEAD_TOKENS-th token. Returns how many forks it made."""
        body = streamed_search(TASK, number, trigger, FORK_TOKENS, BASE_TOKENS)
        chunks, forks = 0, None
        async with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunks += 1
                if chunks >= LEAD_TOKENS:
                    reasons.set()
                report = (json.loads(line[6:]).get("sglext") or {}).get("specgen")
                forks = len(report["forks"]) if report else forks
        if forks is None:
            raise RuntimeError(f"search {number}: no report came")
        return forks

    async def burst(self, number: int) -> list[float]:
        """Seconds to the first token of each ordinary request; sent as one batch, so that all are queued at once."""
        prompts = [[1000 + (number + n) % 100_000, *range(3000, 3000 + PROMPT_TOKENS - 1)] for n in range(ORDINARY)]
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        body = {"input_ids": prompts, "stream": True, "sampling_params": params}
        started, first = time.perf_counter(), dict[int, float]()
        async with self.client.stream("POST", f"{self.url}/generate", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    first.setdefault(json.loads(line[6:])["index"], time.perf_counter() - started)
        if len(first) != ORDINARY:
            raise RuntimeError(f"burst {number}: {ORDINARY - len(first)} requests got no token")
        return list(first.values())

    async def wave(self, trigger: str) -> tuple[list[float], int]:
        self.served += 1
        first = self.served * 1000
        begun = [asyncio.Event() for _ in range(SEARCHES)]
        searches = [asyncio.create_task(self.search(first + n, trigger, event)) for n, event in enumerate(begun)]
        await asyncio.gather(*(asyncio.wait_for(event.wait(), 120) for event in begun))
        ttft = await self.burst(first)
        forks = await asyncio.gather(*searches)
        await self.quiet()
        return ttft, sum(forks)

    async def quiet(self) -> None:
        """Until nothing of a wave is left: the next must find an empty pool."""
        for _ in range(200):
            if not (await self.counts())["watched"] and (await self.client.post(f"{self.url}/flush_cache")).is_success:
                return
            await asyncio.sleep(0.1)
        raise RuntimeError("the server does not become quiet")

    async def run(self, waves: int, trigger: str) -> Run:
        before = await self.counts()
        ttft: list[float] = []
        forks = 0
        for _ in range(waves):
            found, made = await self.wave(trigger)
            ttft += found
            forks += made
        after = await self.counts()
        ordinary, retracted = (after[k] - before[k] for k in ("ordinary_retracted", "forks_retracted"))
        return Run(ttft, ordinary, retracted, forks)


async def measure(url: str, pairs: int, waves: int) -> list[tuple[Run, Run]]:
    """(with forks, without) for each pair."""
    found: list[tuple[Run, Run]] = []
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=64)) as client:
        bench = Bench(client, url)
        await bench.run(1, TRIGGER)
        for number in range(pairs):
            runs: dict[str, Run] = {}
            for trigger in (TRIGGER, "none") if number % 2 == 0 else ("none", TRIGGER):
                runs[trigger] = await bench.run(waves, trigger)
            found.append((runs[TRIGGER], runs["none"]))
            print(f"pair {number + 1}: {json.dumps(summary_of(found[-1:]))}", file=sys.stderr, flush=True)
    return found


def summary_of(pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    forked, plain = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    p95 = [float(np.percentile([s for run in runs for s in run.ttft_s], 95)) for runs in (forked, plain)]
    return {
        "forks": sum(run.forks for run in forked),
        "forks_retracted": sum(run.forks_retracted for run in forked),
        "ordinary_retracted": {
            "with_forks": sum(run.ordinary_retracted for run in forked),
            "without": sum(run.ordinary_retracted for run in plain),
        },
        "ttft_p95_s": {"with_forks": round(p95[0], 4), "without": round(p95[1], 4)},
        "ttft_p95_ratio": round(p95[0] / p95[1], 4),
        "ttft_p95_ratio_paired_median": round(statistics.median(a.p95_s / b.p95_s for a, b in pairs), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--waves", type=int, default=3, help="waves of each run of a pair")
    parser.add_argument("--conservativeness", type=float, default=1.0, help="SGLang's --schedule-conservativeness")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    if options.pairs < 1 or options.waves < 1:
        parser.error("--pairs, --waves: 1 or more")
    with tempfile.TemporaryDirectory(prefix="specgen-bench-") as folder:
        arguments = [
            *("--tiny", "--max-total-tokens", str(POOL), "--specgen-fork-per-search", str(FORKS_A_SEARCH)),
            *("--schedule-conservativeness", str(options.conservativeness)),
        ]
        with together(Path(folder), Wanted(arguments)) as (server,):
            pairs = asyncio.run(measure(server.url, options.pairs, options.waves))
    report = new_report("specgen.engine_starved/1", None, "bench.engine_starved") | {
        "what": "real SGLang CPU engine, tiny model; the same waves with forks and with the trigger off, paired",
        "asked_tokens": ASKED,
        "pool_tokens": POOL,
        "waves": options.waves,
        "conservativeness": options.conservativeness,
        "pairs": [
            {
                name: {**run._asdict(), "ttft_s": [round(s, 4) for s in run.ttft_s]}
                for name, run in zip(("with_forks", "without"), pair, strict=True)
            }
            for pair in pairs
        ],
        "summary": summary_of(pairs),
    }
    print(json.dumps(report["summary"], indent=1))
    if options.json:
        write_report(options.json, report)


if __name__ == "__main__":
    main()

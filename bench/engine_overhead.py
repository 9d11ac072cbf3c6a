"""What the flag costs when nobody searches: two servers up at once, one with --enable-specgen, asked in turn.

    python -m bench.engine_overhead --pairs 20 --json bench/results/engine_overhead_cpu.json

A pair is several rounds; in a round both servers get the same requests one after the other, and who comes first changes
from round to round (ABBA), so that what else the machine does meets both. Real SGLang on the CPU engine with the tiny
model: a decode step takes some 10 ms there, as with a large model on a GPU, so what the hooks add to a step weighs the
same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from scipy import stats

from bench.engine_servers import Wanted, together
from bench.machine import new_report, write_report

PROMPT_TOKENS, NEW_TOKENS, AT_ONCE = 64, 32, 8


class Pair(NamedTuple):
    """Output tokens a second of both servers over the same requests."""

    with_flag: float
    without: float

    @property
    def ratio(self) -> float:
        return self.with_flag / self.without


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval_of(ratios: list[float]) -> Interval:
    """Mean and 95 % interval of paired ratios: Student's t on their logarithms. Raises ValueError below two pairs."""
    if len(ratios) < 2:
        raise ValueError(f"--pairs {len(ratios)}: an interval needs two or more")
    logs = [math.log(ratio) for ratio in ratios]
    freedom = len(logs) - 1
    t = float(stats.t.ppf(0.975, freedom))
    mean, half = statistics.fmean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


async def burst(client: httpx.AsyncClient, url: str, seed: int) -> float:
    """Seconds until AT_ONCE requests of NEW_TOKENS tokens each are answered; prompts differ by seed: none is cached."""

    async def one(number: int) -> None:
        first = 1000 + (seed * AT_ONCE + number) % 100_000
        body: dict[str, Any] = {
            "input_ids": [first, *range(2000, 2000 + PROMPT_TOKENS - 1)],
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        answer = await client.post(f"{url}/generate", json=body)
        answer.raise_for_status()
        if answer.json()["meta_info"]["completion_tokens"] != NEW_TOKENS:
            raise RuntimeError(f"{url}: {answer.json()['meta_info']['completion_tokens']} tokens, not {NEW_TOKENS}")

    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(AT_ONCE)))
    return time.perf_counter() - started


async def measure(with_flag: str, without: str, pairs: int, rounds: int) -> list[Pair]:
    found: list[Pair] = []
    async with httpx.AsyncClient(timeout=120) as client:
        for seed in (0, 1):
            for url in (with_flag, without):
                await burst(client, url, seed)
        for number in range(pairs):
            seconds = {with_flag: 0.0, without: 0.0}
            for round_ in range(rounds):
                order = (with_flag, without) if (number + round_) % 2 == 0 else (without, with_flag)
                for url in order:
                    seconds[url] += await burst(client, url, 2 + number * rounds + round_)
            tokens = rounds * AT_ONCE * NEW_TOKENS
            found.append(Pair(tokens / seconds[with_flag], tokens / seconds[without]))
            print(f"pair {number + 1}: {found[-1].ratio:.4f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6, help="bursts a server gets in a pair")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    if options.pairs < 2 or options.rounds < 1:
        parser.error("--pairs: 2 or more; --rounds: 1 or more")
    with tempfile.TemporaryDirectory(prefix="specgen-bench-") as folder:
        arguments = ("--tiny", "--max-total-tokens", "16384")
        with together(Path(folder), Wanted(arguments), Wanted(arguments, specgen=False)) as (with_flag, without):
            pairs = asyncio.run(measure(with_flag.url, without.url, options.pairs, options.rounds))
    found = interval_of([pair.ratio for pair in pairs])
    report = new_report("specgen.engine_overhead/1", None, "bench.engine_overhead") | {
        "what": "real SGLang CPU engine, tiny model; output tokens/s with the flag over without, no search",
        "rounds": options.rounds,
        "pairs": [{"with_flag": round(p.with_flag, 2), "without": round(p.without, 2)} for p in pairs],
        "ratio": {name: round(value, 4) for name, value in found._asdict().items()},
        "within_0.97_1.03": found.low >= 0.97 and found.high <= 1.03,
    }
    print(json.dumps({name: report[name] for name in ("ratio", "within_0.97_1.03")}, indent=1))
    if options.json:
        write_report(options.json, report)


if __name__ == "__main__":
    main()

"""What the trigger `entropy:H` costs those in its batch: decode rate beside a search with it and beside one without.

    python -m bench.entropy_cost --pairs 8 --json bench/results/entropy_cost_cpu.json

One log-probability request makes SGLang compute log-probabilities for its whole batch at every step. Real SGLang on the
CPU engine, one server. A run is one search's base and ordinary requests that decode beside it; its trigger is
an entropy that is never reached, or a distance that is never reached: neither run forks. A pair plays both, the order
changes from pair to pair. The model is SmolLM2-135M (vocabulary 49,152): a random one's distribution is flat, so that
it would fork at every token. A model with more layers loses a smaller share.
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

import httpx

from bench.engine_overhead import interval_of
from bench.engine_servers import Wanted, together
from bench.machine import new_report, write_report
from bench.streamed_search import streamed_search
from specgen_engine.replay.trace import BUNDLED, load_traces

TASK = load_traces([BUNDLED])[0].task_source
BESIDE, BASE_TOKENS, NEW_TOKENS, PROMPT_TOKENS = 7, 192, 96, 64
ENTROPY, NEVER = "entropy:2.0794", "every:1000000"


class Bench:
    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.client, self.url, self.served = client, url, 0

    async def base(self, number: int, trigger: str, reasons: asyncio.Event) -> int:
        """The search whose trigger it is about; `reasons` is set with its first tokens. Returns the forks it made."""
        forks = 0
        body = streamed_search(TASK, number, trigger, 16, BASE_TOKENS)
        async with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    reasons.set()
                    forks = len((json.loads(line[6:]).get("sglext") or {}).get("specgen", {}).get("forks", ())) or forks
        return forks

    async def run(self, trigger: str) -> float:
        """Tokens a second of the ordinary requests beside it; the base outlives them."""
        self.served += 1
        reasons = asyncio.Event()
        base = asyncio.create_task(self.base(self.served, trigger, reasons))
        await asyncio.wait_for(reasons.wait(), 120)
        first = 1000 + self.served * BESIDE
        prompts = [[first + n, *range(3000, 3000 + PROMPT_TOKENS - 1)] for n in range(BESIDE)]
        params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        started = time.perf_counter()
        answer = await self.client.post(f"{self.url}/generate", json={"input_ids": prompts, "sampling_params": params})
        seconds = time.perf_counter() - started
        answer.raise_for_status()
        if base.done():
            raise RuntimeError(f"the base ended before the requests beside it: {base.exception() or BASE_TOKENS}")
        if forks := await base:
            raise RuntimeError(f"{trigger} made {forks} forks, not none")
        return BESIDE * NEW_TOKENS / seconds


async def measure(url: str, pairs: int) -> list[tuple[float, float]]:
    """Tokens a second beside (an entropy trigger, a trigger without) for each pair."""
    found = []
    async with httpx.AsyncClient(timeout=300) as client:
        bench = Bench(client, url)
        for trigger in (ENTROPY, NEVER):
            await bench.run(trigger)
        for number in range(pairs):
            order = (ENTROPY, NEVER) if number % 2 == 0 else (NEVER, ENTROPY)
            rates = {trigger: await bench.run(trigger) for trigger in order}
            found.append((rates[ENTROPY], rates[NEVER]))
            print(f"pair {number + 1}: {rates[ENTROPY] / rates[NEVER]:.4f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs {options.pairs}: an interval needs two or more")
    wanted = Wanted(["--smollm", "--max-total-tokens", "16384"])
    with tempfile.TemporaryDirectory(prefix="specgen-bench-") as folder, together(Path(folder), wanted) as (server,):
        pairs = asyncio.run(measure(server.url, options.pairs))
    found = interval_of([with_entropy / without for with_entropy, without in pairs])
    report = new_report("specgen.entropy_cost/1", None, "bench.entropy_cost") | {
        "what": "real SGLang CPU engine; tokens/s of seven requests beside a base with entropy:H over without",
        "pairs": [{"entropy": round(a, 2), "without": round(b, 2)} for a, b in pairs],
        "ratio": {name: round(value, 4) for name, value in found._asdict().items()},
        "tokens_s_median": [round(statistics.median(column), 1) for column in zip(*pairs, strict=True)],
    }
    print(json.dumps({name: report[name] for name in ("ratio", "tokens_s_median")}, indent=1))
    if options.json:
        write_report(options.json, report)


if __name__ == "__main__":
    main()

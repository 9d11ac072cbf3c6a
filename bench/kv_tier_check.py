"""Are answers the same with the tier as without it? Real servers, one attention backend at a time.

    python -m bench.kv_tier_check --json F --model DIR --attention-backend triton flashinfer

For each backend two servers run the same model: one with the tier off and a pool that holds everything, one with
--specgen-kv peer and a pool that holds a few prompts. Both are asked the same, in the same order, one request at a
time: every prompt, then every prompt with a suffix, whose prefix is then in the own cache of the first server and,
evicted meanwhile, in the second one's tier. Shapes are the same, so tokens must be. Then once more while the lender
takes chunks back: what is lost is computed again, in another shape, so that tokens may differ by rounding; how many did
is reported, and no request may fail. The servers are on GPU 0, the lender on the next where there is one; each row says
which.

The first backend's answers with the tier off are compared with every backend's with the tier. FlashInfer's kernels take
no float32, and in SGLang's deterministic mode its radix cache is off; so it is float16 with float32 logits, and where
two backends part, the row says how far ahead the first one's token was (a tie: less than rounding moves it). Weights
are those of specgen_engine/models/weights.py: `changed` says how many answers one other token in the prefix changes.
16 forks of two bases on the server with the tier are asked of the first backend with the tier off, and compared so too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.kv_tier_client import Answer, Client, random_ids
from bench.kv_tier_servers import GPU_ARGUMENTS, LenderProcess, Options, gpu_beside, lender
from bench.machine import new_report, write_report
from bench.models_client import Client as SearchClient
from bench.models_forks import Shape, forks_of, search_all
from specgen_engine.errors import SpecGenError
from specgen_engine.models.weights import SCALED, SWITCH
from specgen_engine.serving.process import running_server

PROMPTS, LENGTH, TOKENS = 16, 1_000, 32
SMALL_POOL, LARGE_POOL = 4_096, 40_960
PRECISION = ("--dtype", "float16", "--enable-fp32-lm-head")
SEARCHES = Shape(bases=2, longest=400)


class Pair(NamedTuple):
    """A backend's servers, with the tier off and with it; gpu: the lender's."""

    backend: str
    plain: Client
    remote: Client
    peer: LenderProcess
    gpu: int


def start(stack: ExitStack, options: Options, name: str, pool: int, arguments: list[str]) -> Client:
    words = ["--enable-specgen", "--model-path", str(options.model), *GPU_ARGUMENTS, *PRECISION, *arguments]
    words += ["--attention-backend", options.attention_backend, "--max-total-tokens", str(pool)]
    log = options.logs / f"check_{options.attention_backend}_{name}.log"
    server = stack.enter_context(running_server(words, log, {**os.environ, SWITCH: SCALED}, timeout_s=280))
    return Client(server.url, 0)


def answers_of(client: Client) -> list[Answer]:
    """Every prompt with a suffix, after all prompts were computed once."""
    prompts = [random_ids(500 + i, LENGTH) for i in range(PROMPTS)]
    for prompt in prompts:
        client.ask(prompt)
    return [client.ask(prompt, TOKENS, leads=True) for prompt in prompts]


def changed_by_a_token(client: Client, expected: list[Answer]) -> int:
    """How many answers are others when one token in the middle of the prefix is: what equal answers are worth."""
    changed = 0
    for number, wanted in enumerate(expected):
        prompt = random_ids(500 + number, LENGTH)
        prompt[LENGTH // 2] += 1
        changed += client.ask(prompt, TOKENS, suffix=PROMPTS + number + 1).ids != wanted.ids
    return changed


def compared(first: list[Answer], found: list[Answer]) -> dict[str, Any]:
    """Answers that are equal; of the others, by how much the first one's token led where they part."""
    leads = []
    for one, other in zip(first, found, strict=True):
        parted = [at for at, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b]
        if parted:
            leads.append(round(one.leads[parted[0]], 6))
    every = sorted(lead for one in first for lead in one.leads)
    return {
        "equal": len(first) - len(leads),
        "leads_where_parted": leads,
        "lead_median": every[len(every) // 2] if every else None,
    }


def forks(client: Client, reference: Client) -> dict[str, Any]:
    """What forks of two searches say, against what the reference says to their prompts."""
    said = forks_of(search_all(SearchClient(client.url), 500, SEARCHES))
    found = [Answer(0.0, one.output_ids, one.reused, 0) for one in said]
    first = [reference.ask_ids(one.input_ids, len(one.output_ids), leads=True) for one in said]
    return {"forks": len(said), "prefix_reused": sum(one.reused for one in said), **compared(first, found)}


def revoked(client: Client, peer: LenderProcess, expected: list[Answer]) -> dict[str, Any]:
    """The same prompts while a quarter of the chunks goes back before every third."""
    chunks, equal = 0, 0
    for number, wanted in enumerate(expected):
        if number % 3 == 0:
            for epoch in peer.tell("epochs").values():
                chunks += peer.tell(f"revoke {epoch} 64 0.05")["chunks"]
        equal += client.ask(random_ids(500 + number, LENGTH), TOKENS, suffix=PROMPTS + number + 1).ids == wanted.ids
    return {"answered": len(expected), "equal": equal, "chunks": chunks, "state": client.tier_state()}


def start_pair(stack: ExitStack, options: Options) -> Pair:
    gpu = gpu_beside()
    peer = stack.enter_context(lender(options, "1GiB", 2, gpu))
    tier = ["--specgen-kv", "peer", "--specgen-kv-directory", str(peer.folder), "--specgen-kv-chunk-mib", "2"]
    with ThreadPoolExecutor(2) as threads:
        plain = threads.submit(start, stack, options, "off", LARGE_POOL, [])
        remote = threads.submit(start, stack, options, "peer", SMALL_POOL, tier)
        return Pair(options.attention_backend, plain.result(), remote.result(), peer, gpu)


def check(pair: Pair, reference: Client, first: list[Answer] | None) -> tuple[dict[str, Any], list[Answer]]:
    """A row: how many answers agree, and where their prefixes came from; and the answers with the tier off.

    reference, first: the first backend's server and answers with the tier off.
    """
    started = time.monotonic()
    expected, found = answers_of(pair.plain), answers_of(pair.remote)
    row: dict[str, Any] = {"attention_backend": pair.backend, "prompts": PROMPTS, "tokens": TOKENS}
    row |= {
        "lender_gpu": pair.gpu,
        "equal": compared(expected, found)["equal"],
        "to_first_backend": compared(first or expected, found),
        "own_cache_tokens": sum(one.device for one in expected),
        "device_tokens": sum(one.device for one in found),
        "tier_tokens": sum(one.tier for one in found),
        "state": pair.remote.tier_state(),
        "changed": changed_by_a_token(pair.plain, expected),
        "forks_to_first_backend": forks(pair.remote, reference),
        "under_revocation": revoked(pair.remote, pair.peer, expected),
    }
    return row | {"seconds": round(time.monotonic() - started)}, expected


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_tier_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--attention-backend", nargs="+", default=["triton", "flashinfer"])
    parser.add_argument("--wait-for", type=Path, help="a file: servers start at once, requests when it exists")
    parser.add_argument("--logs", type=Path, default=Path("kv_tier_logs"))
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    report = new_report("specgen.kv_tier_check/1", 500) | {"rows": []}
    options = [Options(args.model, "peer", name, 0, args.logs) for name in args.attention_backend]
    with ExitStack() as stack, ThreadPoolExecutor(len(options)) as threads:
        starting = [threads.submit(start_pair, stack, one) for one in options]
        wait(starting)
        while args.wait_for is not None and not args.wait_for.exists():
            time.sleep(0.2)
        reference: Client | None = None
        first: list[Answer] | None = None
        for name, pair in zip(args.attention_backend, starting, strict=True):
            try:
                reference = reference or pair.result().plain
                row, answers = check(pair.result(), reference, first)
                first = first or answers
            except (SpecGenError, OSError, ValueError) as error:
                row = {"attention_backend": name, "error": str(error)}
            report["rows"].append(row)
            write_report(args.json, report)
            print(row, flush=True)
    return 0 if all(row.get("equal") == PROMPTS for row in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())

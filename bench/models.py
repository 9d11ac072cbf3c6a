"""GLM-5 and DeepSeek-V4 in the modes they are served in: forks, restores, speed and accounts.

    python -m bench.models --json F --logs DIR --cases glm5-small:plain glm5-small:mtp@1 deepseek-v4-small:plain@1

A case is MODEL:MODE[@GPU]; modes: plain, fp32-head (logits not rounded to bfloat16), invariant, fp8, mtp, mtp-accepted,
tp2, tp2-mtp, tier, invariant-tier, invariant-mtp, tp2-invariant, mtp-tier, mtp-accepted-tier, dp2. All servers start at
once; what is timed runs alone, the other checks side by side, in the order of --steps. Real widths, few layers and
experts, random weights that a token's whole context shows in (specgen_engine/models/weights.py). `--cases tiny:plain
tiny:tier` rehearses all of it on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench.machine import new_report, write_report
from bench.models_client import together
from bench.models_forks import Shape, check_forks, prompt_of
from bench.models_load import slowdown, storm
from bench.models_servers import Case, Running, case_of, is_strict, start
from bench.models_tier import LENGTHS, restores
from bench.models_turns import TIMED, TimeIsOver, Turns
from specgen_engine.errors import SpecGenError

SCHEMA = "specgen.models/1"
STEPS = ("smoke", "restores", "forks", "storm", "slowdown")
CPU = Shape(bases=2, forks=2, longest=96, tokens=96)
CPU_LENGTHS = (512, 2_048)


class Report:
    """Rows, saved after each."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._lock = path, threading.Lock()
        self._content = {**new_report(SCHEMA, seed), "cases": {}}

    def put(self, case: Case, step: str, row: Any) -> None:
        with self._lock:
            self._content["cases"].setdefault(case.name, {})[step] = row
            write_report(self._path, self._content)
        print(f"{case.name} {step}: {row}"[:1_500], flush=True)


def smoke(running: Running) -> dict[str, Any]:
    """Short and long prompts, one and several at once: does the model run at all, and does it repeat itself."""
    client, longest = running.client, 96 if running.case.model == "tiny" else 4_096
    row: dict[str, Any] = {"startup_s": running.startup_s}
    for words in (3, longest // 2, longest):
        ids = [1_000 + at % 997 for at in range(words)]
        first, again = client.generate(ids, 12), client.generate(ids, 12)
        row[f"prompt_{words}"] = {
            "seconds": first.seconds,
            "cached_again": again.cached,
            "same": first.ids == again.ids,
            "distinct": len(set(first.ids)),
            "logprob": first.logprobs[0],
        }
    found = together([partial(client.generate, [2_000 + n, 3_000, 4_000 + n], 24) for n in range(4)])
    row["at_once_s"] = max(one.seconds for one in found)
    row["state"] = client.state()
    return row


def applies(step: str, case: Case) -> bool:
    """Restores are the tier's; speed beside forks is measured without it and without slower operators."""
    slow = case.has_tier or case.is_invariant or case.mode == "fp32-head"
    return {"restores": case.has_tier, "slowdown": not slow}.get(step, True)


def check(running: Running, at: int, seed: int, report: Report, turns: Turns) -> None:
    """Each step by itself: one that fails leaves its error in the report, and the next one runs."""
    case, client = running.case, running.client
    shape = CPU if case.model == "tiny" else Shape()
    lengths = CPU_LENGTHS if case.model == "tiny" else LENGTHS
    forks: dict[str, Any] = {}
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "smoke": lambda: smoke(running),
        "forks": lambda: check_forks(client, seed, shape, forks),
        "slowdown": lambda: {**slowdown(client, seed + 1, shape), "strict": is_strict(case)},
        "storm": lambda: storm(client, seed + 2, shape),
    }
    for step in turns.steps:
        if not applies(step, case):
            continue
        try:
            with turns.take(step, at) as starting:
                beside = {"servers_starting": starting} if step in TIMED else {}
                if step == "restores":
                    for row in restores(running, lengths):
                        report.put(case, f"restore_{row['prefix_tokens']}", {**row, **beside})
                else:
                    report.put(case, step, {**calls[step](), **beside})
        except TimeIsOver:
            return
        except Exception as error:
            text = "cut off: the budget was over" if turns.over else f"{type(error).__name__}: {error}"[:400]
            known = forks if step == "forks" else {}
            report.put(case, step, {**known, "error": text, "log": tail(running.log)})
            if not turns.over:
                traceback.print_exc()


def tail(log: Path, lines: int = 12) -> list[str]:
    """The last lines that tell of an error, else the last."""
    text = [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()]
    marks = ("Error", "error:", "assert", "memory leak", "specgen:", "File ")
    return ([line for line in text if any(mark in line for mark in marks)] or text)[-lines:]


def serve_and_check(
    stack: ExitStack, cases: list[Case], at: int, logs: Path, end: float, seed: int, report: Report, turns: Turns
) -> bool:
    """Whether the server came up."""
    case = cases[at]
    try:
        running = start(stack, case, logs, end - time.monotonic() - 20)
    except SpecGenError as error:
        log = logs / f"server_{case.model}_{case.mode}.log"
        report.put(case, "start", {"error": str(error), "log": tail(log, 30) if log.exists() else []})
        return False
    finally:
        turns.started()
    check(running, at, seed, report, turns)
    stack.close()
    return True


def run(cases: list[Case], steps: list[str], logs: Path, budget_s: float, seed: int, report: Report) -> int:
    """Start all, check each as it is up; what runs when the budget ends is cut off. How many cases never came up."""
    end, turns = time.monotonic() + budget_s, Turns(steps, len(cases))
    stacks = [ExitStack() for _ in cases]
    with ThreadPoolExecutor(len(cases)) as threads:
        came_up = [
            threads.submit(serve_and_check, stacks[at], cases, at, logs, end, seed, report, turns)
            for at in range(len(cases))
        ]
        wait(came_up, timeout=budget_s)
        turns.end()
        together([stack.close for stack in stacks])
    return sum(not future.result() for future in came_up)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", required=True, metavar="MODEL:MODE[@GPU]")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--budget-s", type=float, default=300)
    parser.add_argument("--seed", type=int, default=9)
    args = parser.parse_args()
    try:
        cases = [case_of(text) for text in args.cases]
    except SpecGenError as error:
        print(f"bench.models: {error}", file=sys.stderr)
        return 2
    print(f"steps: {' '.join(args.steps)}; first prompt: {prompt_of(args.seed, 4)}", flush=True)
    return 1 if run(cases, args.steps, args.logs, args.budget_s, args.seed, Report(args.json, args.seed)) else 0


if __name__ == "__main__":
    sys.exit(main())

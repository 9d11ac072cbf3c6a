"""`specgen replay`: recorded traces through a real server, driven by the openai client; writes a specgen.report/1."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.controller.termination import parse_termination
from specgen_engine.controller.thinking import without_thinking
from specgen_engine.controller.triggers import parse_trigger
from specgen_engine.errors import SpecGenError
from specgen_engine.evaluation.base import Candidate
from specgen_engine.files import require_writable
from specgen_engine.observability.machine import new_report, write_report
from specgen_engine.replay.trace import Iteration, Trace, load_traces
from specgen_engine.serving.command import prepare
from specgen_engine.serving.process import Server, running_server

MODES = ("sequential", "specgen")
MAX_TOKENS = 100_000
# The default model decodes near the 60 tokens/s that large reasoning models are served at, so that a replay on a CPU
# weighs reasoning against evaluation as a real server would.
PACED_LAYERS = 12
# On a CPU a decode step's time grows with its batch; see scheduler.policy.base_steps_aside.
CPU_BASE_SHARE = 0.25
# One evaluator whose C++ builds take half a minute: more forks would only queue for it.
CPU_TRIGGER = "every:1000"


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What the command line asked for. json: where the report goes; iterations: at most so many of each trace."""

    traces: tuple[Path, ...]
    mode: str = "specgen"
    trigger: str = CPU_TRIGGER
    termination: str = "gain:0.3"
    json: Path | None = None
    iterations: int | None = None
    workers: int = 1
    model: str | None = None
    page_size: int = 1
    base_share: float = CPU_BASE_SHARE

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SpecGenError(f"--mode {self.mode!r}: use one of {', '.join(MODES)}")
        parse_trigger(self.trigger, "--trigger")
        parse_termination(self.termination, "--termination")
        if not 0 < self.base_share <= 1:
            raise SpecGenError(f"--base-share {self.base_share}: use a share above 0, at most 1")


def replay(options: ReplayOptions) -> None:
    """Play every trace and print its report as JSON on stdout unless --json names a file."""
    traces = load_traces(options.traces)
    if options.json is not None:
        require_writable(options.json, "--json")
    with (
        tempfile.TemporaryDirectory(prefix="specgen-replay-") as scratch,
        replay_server(traces, options, Path(scratch)) as server,
    ):
        report = play(traces, options, server)
    if options.json is None:
        print(json.dumps(report, indent=1))
    else:
        write_report(options.json, report)


def replay_server(traces: list[Trace], options: ReplayOptions, scratch: Path) -> AbstractContextManager[Server]:
    """A server that replays these traces, with a cache of builds of its own: no run profits from an earlier one."""
    arguments = ["--model-path", options.model] if options.model else ["--tiny-layers", str(PACED_LAYERS)]
    arguments += ["--replay", *(str(trace.path.resolve()) for trace in traces)]
    arguments += ["--specgen-evaluation-workers", str(options.workers), "--page-size", str(options.page_size)]
    arguments += ["--specgen-scheduler-base-share", str(options.base_share)]
    arguments += ["--specgen-evaluation-cache", str(scratch / "builds")]
    launch = prepare(arguments)
    print(f"starting a server for {len(traces)} trace(s) ...", file=sys.stderr, flush=True)
    return running_server(launch.arguments, scratch / "server.log", launch.environment)


def play(traces: list[Trace], options: ReplayOptions, server: Server) -> dict[str, Any]:
    """Every iteration in turn; the whole report."""
    console = Console(stderr=True)
    started = time.monotonic()
    rows = []
    for trace in traces:
        for iteration in trace.iterations[: options.iterations]:
            rows.append(play_iteration(trace, iteration, options, server))
            console.print(one_line(rows[-1]), highlight=False)
    header = new_report("specgen.report/1", seed=None)
    return {
        **header,
        "mode": options.mode,
        "kind": "replayed",
        "trigger": options.trigger,
        "termination": options.termination,
        "wall_s": round(time.monotonic() - started, 3),
        "server_startup_s": round(server.startup_s, 1),
        "traces": rows,
    }


def play_iteration(trace: Trace, iteration: Iteration, options: ReplayOptions, server: Server) -> dict[str, Any]:
    """One chat request. sequential is a search without forks: the whole reasoning, then its answer is evaluated."""
    policy = (options.trigger, options.termination) if options.mode == "specgen" else ("none", "none")
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
    answer = client.chat.completions.create(**chat_request(trace, iteration, *policy)).model_dump()
    message = answer["choices"][0]["message"]
    return row_of(answer["sglext"]["specgen"], iteration, message["content"] or "", answer["usage"])


def chat_request(
    trace: Trace,
    iteration: Iteration,
    trigger: str,
    termination: str,
    max_tokens: int = MAX_TOKENS,
    fork: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the openai client is given to replay an iteration, as an agent would send it; fork: the request's own."""
    prompt = f"Write a faster module ModelNew with the same results as Model.\n\n```python\n{trace.task_source}\n```\n"
    asked = {
        "task": trace.task_source,
        "name": trace.name,
        "iteration": iteration.number,
        "trigger": trigger,
        "termination": termination,
    }
    asked |= {"fork": fork} if fork else {}
    return {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "extra_body": {"custom_params": {"specgen": json.dumps(asked)}},
    }


def row_of(search: dict[str, Any], iteration: Iteration, answer: str, usage: dict[str, Any]) -> dict[str, Any]:
    """A search's record as a trace's row of specgen.report/1 (DESIGN.md, Reports)."""
    known = {Candidate(source).hash: name for name, source in recorded_sources(iteration)}
    for candidate in search["candidates"]:
        candidate["recorded_answer"] = known.get(candidate["hash"])
    kept = (
        "iteration", "wall_s", "reasoning_tokens", "recorded_reasoning_tokens", "ended_by", "reason", "accepted",
        "best", "final", "forks", "candidates", "prompt_tokens", "fork_tokens", "answer_tokens", "forks_skipped",
        "reasoning_s", "evaluation_s", "termination", "trigger",
    )  # fmt: skip
    measured = (iteration.measured or {}).get("final")
    recorded_final = {"status": str(measured.status), "speedup": measured.speedup} if measured else None
    row = {"trace": search["trace"], **{name: search[name] for name in kept}}
    return {**row, "recorded_final": recorded_final, "answer": without_thinking(answer), "usage": usage}


def recorded_sources(iteration: Iteration) -> list[tuple[str, str]]:
    """(name, source) of every recorded answer that holds a module; of equal ones the earliest comes last."""
    forks = [(f"fork-{n}", text) for n, text in sorted(iteration.forks.items())]
    answers = [*forks, ("final", iteration.final)]
    return [(name, source) for name, text in reversed(answers) if (source := extract_candidate(text)) is not None]


def reasoning_of(row: dict[str, Any]) -> str:
    """N of M recorded tokens. A search's count has the closing mark too, which a recording's has not."""
    recorded = row["recorded_reasoning_tokens"]
    return f"{min(row['reasoning_tokens'], recorded)} of {recorded}"


def one_line(row: dict[str, Any]) -> str:
    accepted = row["accepted"]
    kernel = f"{accepted['source']} {accepted['speedup']:.2f}x" if accepted and accepted.get("speedup") else "no kernel"
    tokens = f"{reasoning_of(row)} reasoning tokens"
    ended = f"{len(row['forks'])} forks, ended by {row['ended_by']}, {kernel}"
    return f"{row['trace']}/{row['iteration']}: {row['wall_s']:.1f} s, {tokens}, {ended}"

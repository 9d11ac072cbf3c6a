"""`make demo`: the bundled CPU trace, sequential and with SpecGen, on one server; both timelines side by side."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.replay.command import ReplayOptions, play, reasoning_of, replay_server
from specgen_engine.replay.trace import load_traces

BUNDLED = Path(__file__).parent / "bundled" / "cpu_row_softmax"
TERMINATION = "speedup:1.2"


def demo() -> None:
    console = Console()
    options = ReplayOptions((BUNDLED,), termination=TERMINATION)
    traces = load_traces(options.traces)
    with (
        tempfile.TemporaryDirectory(prefix="specgen-demo-") as scratch,
        replay_server(traces, options, Path(scratch)) as server,
    ):
        console.print(f"server up in {server.startup_s:.0f} s; replaying {BUNDLED.name} twice through the real engine")
        sequential = play(traces, replace(options, mode="sequential"), server)["traces"][0]
        shutil.rmtree(Path(scratch) / "builds", ignore_errors=True)
        specgen = play(traces, options, server)["traces"][0]
    console.print(Columns([_timeline("sequential", sequential), _timeline("SpecGen", specgen)]))
    console.print(Panel(Syntax(extract_candidate(specgen["answer"]) or "", "python"), title=_accepted(specgen)))
    console.print(_summary(sequential, specgen))


def _timeline(title: str, row: dict[str, Any]) -> Table:
    table = Table(title=f"{title}: {row['wall_s']:.1f} s", title_justify="left")
    table.add_column("s", justify="right")
    table.add_column("event")
    for seconds, event in sorted(_events(row)):
        table.add_row(f"{seconds:.1f}", event)
    return table


def _events(row: dict[str, Any]) -> list[tuple[float, str]]:
    events = [(0.0, "reasoning starts"), (row["wall_s"], f"answer: ended by {row['ended_by']}")]
    if row["ended_by"] != "criterion":
        events.append((row["reasoning_s"], f"reasoning ends by itself, {row['recorded_reasoning_tokens']} tokens"))
    for fork in row["forks"]:
        events.append((fork["started_s"], f"fork {fork['n']} at token {fork['at_token']}"))
        if fork["finished_s"] is not None:
            events.append((fork["finished_s"], f"fork {fork['n']} done, {fork['tokens']} tokens"))
    for candidate in row["candidates"]:
        if candidate["verdict_s"] is not None:
            speed = f" {candidate['speedup']:.2f}x" if candidate["speedup"] else ""
            events.append((candidate["verdict_s"], f"{candidate['recorded_answer']}: {candidate['status']}{speed}"))
    return events


def _accepted(row: dict[str, Any]) -> str:
    accepted = row["accepted"]
    return f"accepted kernel ({accepted['source']}, {accepted['speedup']:.2f}x)" if accepted else "no kernel accepted"


def _summary(sequential: dict[str, Any], specgen: dict[str, Any]) -> str:
    slow, fast = sequential["wall_s"], specgen["wall_s"]
    speeds = (
        ("accepted", specgen["accepted"]),
        ("best seen", specgen["best"]),
        ("recorded final answer", sequential["final"]),
    )
    return "\n".join(
        (
            f"end to end (replayed): sequential {slow:.1f} s, SpecGen {fast:.1f} s, ratio {slow / fast:.2f}",
            "speed-up of the kernel: " + ", ".join(f"{name} {_x(kernel)}" for name, kernel in speeds),
            f"reasoning tokens: {reasoning_of(specgen)}; fork tokens {specgen['fork_tokens']}",
        )
    )


def _x(kernel: dict[str, Any] | None) -> str:
    return f"{kernel['speedup']:.2f}x" if kernel and kernel.get("speedup") else "none"

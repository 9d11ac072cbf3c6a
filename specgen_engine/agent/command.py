"""`specgen optimize`: the loop with its files, its progress and its errors."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from specgen_engine.agent.base import AgentError, Budget
from specgen_engine.agent.endpoint import Asking, Endpoint
from specgen_engine.agent.history import History
from specgen_engine.agent.judging import Judge
from specgen_engine.agent.loop import Run, Update
from specgen_engine.agent.prompts import describe
from specgen_engine.agent.report import as_dict, as_html
from specgen_engine.controller.termination import parse_termination
from specgen_engine.controller.triggers import parse_trigger
from specgen_engine.evaluation.base import Task
from specgen_engine.evaluation.command import require_device, require_profiler
from specgen_engine.evaluation.tasks.base import read_text
from specgen_engine.files import require_writable, write_whole
from specgen_engine.observability.machine import new_report, write_report

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for. out: the run's folder; json: a second place for the report's JSON."""

    task: Path
    base_url: str
    api_key: str
    asking: Asking
    budget: Budget
    searches: int = 1
    device: str = "cpu"
    profile: str = ""
    out: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.searches < 1:
            raise AgentError(f"--searches {self.searches}: must be at least 1")
        if self.asking.trigger is not None:
            parse_trigger(self.asking.trigger, "--trigger")
        if self.asking.termination is not None:
            parse_termination(self.asking.termination, "--termination")
        if self.json is not None:
            require_writable(self.json, "--json")

    def folder(self) -> Path:
        return self.out or Path(f"specgen-{task_name(self.task)}")


def task_name(path: Path) -> str:
    return path.absolute().parent.name if path.name == "task.py" else path.stem


def optimize(options: Options) -> None:
    """Run or resume. Exit code 130 after Ctrl-C: best kernel, report and history are kept; the same command goes on."""
    task = Task(read_text(options.task), name=task_name(options.task))
    require_device(options.device)
    require_profiler(options.profile, flag="--profile")
    folder = options.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgentError(f"--out {folder}: {error.strerror}; name a folder, or one that can be made") from None
    require_writable(folder / "report.json", "--out")
    console = Console(stderr=True)
    try:
        ended_by = asyncio.run(_run(options, task, folder, console))
    except KeyboardInterrupt:
        console.print(
            f"stopped; the same command goes on. Best kernel, report, history: {folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(INTERRUPTED) from None
    console.print(f"{ended_by}. Best kernel, report, history: {folder}", highlight=False, soft_wrap=True)


async def _run(options: Options, task: Task, folder: Path, console: Console) -> str:
    endpoint = Endpoint(options.base_url, options.api_key, options.asking)
    judge = Judge(task, options.device, options.profile)
    history: History | None = None
    try:
        await endpoint.connect()
        history = History(folder / "history.sqlite", task.hash, asdict(options.budget))
        await judge.check_task()
        return await _run_over(options, task, folder, console, endpoint, judge, history)
    finally:
        await judge.close()
        await endpoint.close()
        if history is not None:
            history.close()


async def _run_over(
    options: Options, task: Task, folder: Path, console: Console, endpoint: Endpoint, judge: Judge, history: History
) -> str:
    settings = {
        "base_url": options.base_url, **asdict(endpoint.asking), **asdict(options.budget), "searches": options.searches,
        "device": options.device, "speculative": endpoint.speculative,
    }  # fmt: skip
    board = Board(console, options.searches)
    head = new_report("specgen.optimize/1", seed=None)

    def write(ended_by: str) -> None:
        _write_files(run, task, folder, options.json, head, settings, ended_by)

    run = Run(task, options.budget, options.searches, endpoint, judge, history, board.show, lambda: write("running"))
    if run.attempts:
        console.print(
            f"resuming: {sum(one.done for one in run.attempts.values())} iterations are done", highlight=False
        )
    ended_by = "interrupted"
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    if main is not None:
        loop.add_signal_handler(signal.SIGTERM, main.cancel)
    try:
        with board:
            ended_by = await run.run()
    except AgentError as error:
        ended_by = str(error)
        raise
    finally:
        write(ended_by)
        if (best := run.best()) is not None and best.judgement is not None:
            console.print(f"best: {describe(best.judgement)}", highlight=False, soft_wrap=True)
    return ended_by


def _write_files(
    run: Run, task: Task, folder: Path, json: Path | None, head: dict[str, Any], settings: dict[str, Any], ended_by: str
) -> None:
    attempts, spent, best = run.in_order(), run.spent(), run.best()
    report = {**head, **as_dict(task.name, settings, attempts, spent, ended_by)}
    write_report(folder / "report.json", report)
    if json is not None:
        write_report(json, report)
    write_whole(folder / "report.html", as_html(task.name, settings, attempts, spent, ended_by))
    if best is not None and best.source is not None:
        write_whole(folder / "best.py", best.source)


class Board:
    """Live progress on a terminal; one line an iteration elsewhere."""

    def __init__(self, console: Console, searches: int) -> None:
        self.console = console
        self.rows: dict[int, Update] = {}
        self._live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def show(self, update: Update) -> None:
        self.rows[update.search] = update
        if update.attempt is not None:
            self.console.print(_line(update), highlight=False, soft_wrap=True)
        if self.console.is_terminal:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table()
        for name in ("search", "iteration", "doing", "state", "tokens", "forks", "verdicts", "best"):
            table.add_column(name)
        for search, update in sorted(self.rows.items()):
            shown = update.details
            best = f"{shown['best']:.2f}x" if shown.get("best") else ""
            cells = [str(shown.get(name, "")) for name in ("state", "tokens", "forks", "verdicts")]
            table.add_row(str(search), str(update.iteration), update.doing, *cells, best)
        return table


def _line(update: Update) -> str:
    attempt = update.attempt
    assert attempt is not None
    said = describe(attempt.judgement) if attempt.judgement else "no module in the answer"
    seconds = (attempt.ended_s or attempt.generated_s) - attempt.started_s
    search = attempt.generation.search or {}
    forks = f", {len(search['forks'])} forks, ended by {search['ended_by']}" if search else ""
    return f"{attempt.search}/{attempt.iteration}: {said}; {attempt.generation.tokens} tokens, {seconds:.1f} s{forks}"


def options_of(
    task: Path, *, base_url: str, model: str, iterations: int, minutes: float | None, tokens: int | None,
    gpu_seconds: float | None, searches: int, device: str, profile: str, max_tokens: int, temperature: float | None,
    trigger: str | None, termination: str | None, recorded: bool, out: Path | None, json: Path | None,
) -> Options:  # fmt: skip
    """Options from the words of the command line. The key is OPENAI_API_KEY's, since arguments are seen by all."""
    asking = Asking(model, max_tokens, temperature, trigger, termination, recorded)
    key = os.environ.get("OPENAI_API_KEY") or "none"
    budget = Budget(iterations, minutes, tokens, gpu_seconds)
    return Options(task, base_url.rstrip("/"), key, asking, budget, searches, device, profile, out, json)

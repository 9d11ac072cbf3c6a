"""Which trigger and which criterion: every policy on every recorded trace, in virtual time, with the oracle beside it.

    python -m bench.policies --traces DIR... [--scores scores.json] --json F --plot F.png

Answers, statuses, speed-ups and service times are recorded ones; decode rate, evaluators and the forks' slowdown are
parameters. gain: sequential time over the policy's, 1.0 where the criterion is never met; averages are geometric means.
The oracle makes only the forks its criterion needs, at their marks, with an evaluator free: known only afterwards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.machine import new_report, write_report
from bench.policies_harvest import harvest_row
from bench.policies_run import run_rows
from bench.policies_table import markdown
from bench.recordings import Measured, Subject, UsageError, kinds_of, read_scores, subject_of, tokenizer
from bench.service_times import Service, read_service_times
from bench.virtual_time import Machine, Outcome, Recording, View, oracle_seconds, run_search, sequential
from specgen_engine.controller import adaptive
from specgen_engine.controller.termination import Criterion, Speedup, parse_termination
from specgen_engine.controller.triggers import ADAPTIVE_POINTS, fire_points, name_of, parse_trigger
from specgen_engine.replay.trace import TraceError, load_traces

SCHEMA = "specgen.policies/1"
POLICIES = (
    "every:100",
    "every:200",
    "every:400",
    "every:800",
    "every:1600",
    "every:3200",
    "paragraph",
    "paragraph:min=200",
    "paragraph:min=800",
    "paragraph:min=800:new=code",
    "fence",
    "draft",
    "transition:min=200",
    "paragraph:min=400+fence+transition:min=400",
    "adaptive",
)
CRITERIA = ("speedup:1.5", "final:0.9", "correct", "plateau:3", "best_of:4", "gain:0.2", "gain:0.3", "none")
RESULTS = Path(__file__).parent / "results"
IDLE_TIMES = ("evaluation_H200.json",)
TIME_SHARES = (0.25, 0.5, 0.75, 1.0)


def criterion_for(spec: str, recording: Recording) -> Criterion:
    """final:X is an absolute target, X times what the recorded final answer reached."""
    name, _, share = spec.partition(":")
    if name != "final":
        return parse_termination(spec, "--criteria")
    try:
        target = float(share) * (recording.final.speedup or 0.0)
    except ValueError:
        raise UsageError(f"--criteria {spec!r}: final needs a number, as in final:0.9") from None
    return Speedup(target) if target > 0 else parse_termination("none")


def seen(view: View) -> adaptive.View:
    """A point of virtual time as the adaptive policy sees it."""
    gap = view.position - view.last_fork
    return adaptive.View(gap, view.best_speedup, view.position, view.forks, view.fork_tokens, view.in_flight)


class Study:
    """Every policy on every subject for one machine; points and adaptive states are computed once."""

    def __init__(self, subjects: Sequence[Subject], costs: adaptive.Costs):
        self.subjects, self.costs = subjects, costs
        self._points: dict[tuple[str, int], list[int]] = {}

    def points(self, spec: str, index: int) -> list[int]:
        key = (spec, index)
        if key not in self._points:
            found = fire_points(parse_trigger(spec, "--policies"), list(self.subjects[index].pieces))
            self._points[key] = [position for position, _ in found]
        return self._points[key]

    def adaptive(self, index: int, machine: Machine, spec: str, families: dict[str, adaptive.Family]) -> Outcome:
        """Play one subject with the family's state, which learns on the way."""
        recording = self.subjects[index].recording
        name = recording.family
        families.setdefault(name, adaptive.Family())

        def admit(view: View) -> bool:
            return adaptive.wants_fork(families[name], seen(view), view.waiting, machine.evaluators, self.costs)

        def observe(view: View, speedup: float, tokens: int) -> None:
            gap = view.position - view.last_fork
            families[name] = adaptive.observed(families[name], gap, view.best_speedup, speedup, tokens)

        criterion = criterion_for(spec, recording)
        return run_search(recording, machine, criterion, self.points(ADAPTIVE_POINTS, index), admit, observe)

    def play(self, policy: str, index: int, machine: Machine, spec: str) -> Outcome:
        """adaptive learns from every other subject first (leave one out), in their order."""
        if policy != "adaptive":
            recording = self.subjects[index].recording
            return run_search(recording, machine, criterion_for(spec, recording), self.points(policy, index))
        families: dict[str, adaptive.Family] = {}
        for other in range(len(self.subjects)):
            if other != index:
                self.adaptive(other, machine, spec, families)
        return self.adaptive(index, machine, spec, families)

    def row(self, policy: str, index: int, machine: Machine, spec: str) -> dict[str, Any]:
        subject = self.subjects[index]
        recording = subject.recording
        criterion = criterion_for(spec, recording)
        alone, outcome = sequential(recording, machine), self.play(policy, index, machine, spec)
        ideal = oracle_seconds(recording, machine, criterion)
        met = outcome.ended_by == "criterion"
        if isinstance(criterion, Speedup):
            met = outcome.accepted is not None and (outcome.accepted.speedup or 0.0) >= criterion.target
        accepted = outcome.accepted.speedup if outcome.accepted else None
        final = recording.final.speedup
        return {
            "trace": recording.name,
            "family": recording.family,
            "policy": policy,
            "criterion": spec,
            "tokens_per_s": machine.tokens_per_s,
            "evaluators": machine.evaluators,
            "gain": alone.seconds / outcome.seconds if met else 1.0,
            "oracle_gain": max(1.0, alone.seconds / ideal) if ideal else 1.0,
            "accepted_over_final": accepted / final if accepted and final else None,
            "forks": outcome.forks,
            "fork_tokens": outcome.fork_tokens,
            "verdicts": outcome.verdicts,
            "met": met,
            "ended_by": outcome.ended_by,
            "seconds": outcome.seconds,
            "sequential_s": alone.seconds,
            "time_over_sequential": outcome.seconds / alone.seconds,
            "best_over_final": {
                f"{share:.0%}": (outcome.best_at(share * alone.seconds) or 0.0) / final if final else None
                for share in TIME_SHARES
            },
            "service": subject.service,
        }


def mean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the positive values; None without any."""
    kept = [value for value in values if value]
    return statistics.geometric_mean(kept) if kept else None


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a (criterion, rate, policy): geometric means over traces, and the worst trace."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["criterion"], row["tokens_per_s"], row["policy"]].append(row)
    lines = []
    for (criterion, rate, policy), group in groups.items():
        gain, ideal = mean(row["gain"] for row in group), mean(row["oracle_gain"] for row in group)
        verdicts = sum(row["verdicts"] for row in group)
        lines.append(
            {
                "criterion": criterion,
                "tokens_per_s": rate,
                "policy": policy,
                "traces": len(group),
                "gain": gain,
                "oracle_gain": ideal,
                "share_of_oracle": gain / ideal if gain and ideal else None,
                "worst_gain": min(row["gain"] for row in group),
                "time_over_sequential": mean(row["time_over_sequential"] for row in group),
                "worst_time_over_sequential": max(row["time_over_sequential"] for row in group),
                "unmet_cost": max((row["time_over_sequential"] for row in group if not row["met"]), default=None),
                "accepted_over_final": mean(row["accepted_over_final"] for row in group),
                "best_over_final": {
                    f"{share:.0%}": statistics.fmean(row["best_over_final"][f"{share:.0%}"] or 0.0 for row in group)
                    for share in TIME_SHARES
                },
                "met": sum(row["met"] for row in group),
                "forks": statistics.fmean(row["forks"] for row in group),
                "fork_tokens": statistics.fmean(row["fork_tokens"] for row in group),
                "fork_tokens_per_verdict": sum(row["fork_tokens"] for row in group) / verdicts if verdicts else None,
            }
        )
    return lines


def plot(lines: Sequence[dict[str, Any]], rate: float, path: Path) -> None:
    """At one decode rate, a column a criterion: gain against fork tokens, and quality against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [line for line in lines if line["tokens_per_s"] == rate]
    criteria, policies = (list(dict.fromkeys(line[key] for line in chosen)) for key in ("criterion", "policy"))
    colours = pyplot.get_cmap("tab20")
    figure, axes = pyplot.subplots(2, len(criteria), figsize=(3.6 * len(criteria) + 3, 7), squeeze=False)
    for line in chosen:
        column, number = criteria.index(line["criterion"]), policies.index(line["policy"])
        style = {"color": colours(number % 20), "marker": "*" if line["policy"] == "adaptive" else "o", "s": 60}
        label = line["policy"] if column == 0 else None
        axes[0][column].scatter(line["fork_tokens"], line["gain"], label=label, **style)
        if line["accepted_over_final"] is not None:
            axes[1][column].scatter(line["time_over_sequential"], line["accepted_over_final"], **style)
        axes[0][column].axhline(line["oracle_gain"], linestyle="--", color="black", linewidth=1)
    for column, criterion in enumerate(criteria):
        axes[0][column].set(title=f"{criterion}, {rate:g} tokens/s", xlabel="fork tokens a trace")
        axes[1][column].set(xlabel="time / sequential")
    axes[0][0].set_ylabel("gain over sequential (dashed: oracle)")
    axes[1][0].set_ylabel("accepted / final speed-up")
    figure.legend(loc="center right", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1 - 3 / (3.6 * len(criteria) + 3), 1))
    part = path.with_name(f".{path.name}.part.png")
    figure.savefig(part, dpi=110)
    pyplot.close(figure)
    os.replace(part, path)


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    for criterion, rate in dict.fromkeys((line["criterion"], line["tokens_per_s"]) for line in lines):
        here = [line for line in lines if (line["criterion"], line["tokens_per_s"]) == (criterion, rate)]
        table = Table(
            title=f"{criterion}, {rate:g} tokens/s, {here[0]['traces']} traces, oracle {here[0]['oracle_gain']:.2f}x"
        )
        for name in (
            "policy",
            "gain",
            "of oracle",
            "worst",
            "time/seq. worst",
            "accepted/final",
            "met",
            "forks",
            "fork tokens",
            "tokens/verdict",
        ):
            table.add_column(name, justify="left" if name == "policy" else "right")
        for line in here:
            quality, spent = line["accepted_over_final"], line["fork_tokens_per_verdict"]
            table.add_row(
                line["policy"],
                f"{line['gain']:.2f}",
                f"{line['share_of_oracle']:.0%}",
                f"{line['worst_gain']:.2f}",
                f"{line['worst_time_over_sequential']:.3f}",
                "-" if quality is None else f"{quality:.2f}",
                f"{line['met']}/{line['traces']}",
                f"{line['forks']:.1f}",
                f"{line['fork_tokens']:.0f}",
                "-" if spent is None else f"{spent:.0f}",
            )
        console.print(table)


def scores_near(traces: Sequence[str]) -> list[str]:
    """scores.json of each folder or of one of the two above it, and the scores of runs among the results."""
    found = [RESULTS / "fp8_gemm_scores.json"] if (RESULTS / "fp8_gemm_scores.json").is_file() else []
    for trace in map(Path, traces):
        folder = trace.resolve()
        found += [at / "scores.json" for at in (folder, *folder.parents[:2]) if (at / "scores.json").is_file()][:1]
    return [os.path.relpath(path) for path in dict.fromkeys(found)]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.policies", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--traces", nargs="+", required=True, metavar="DIR", help="task folders, or folders of them")
    parser.add_argument("--scores", nargs="*", metavar="F", help="scores (default: scores.json near DIR)")
    parser.add_argument("--service-times", nargs="*", metavar="F", help="verdict reports of an idle machine")
    parser.add_argument("--json", metavar="F", help="report, schema specgen.policies/1")
    parser.add_argument("--plot", metavar="F.png")
    parser.add_argument("--tokens-per-s", nargs="+", type=float, default=[30.0, 60.0, 120.0])
    parser.add_argument("--evaluators", type=int, default=3)
    parser.add_argument("--compilers", type=int, default=8, help="candidates compiled at once")
    parser.add_argument("--max-forks", type=int, default=8, help="forks in flight at once")
    parser.add_argument(
        "--fork-slowdown", type=float, default=0.01, help="share of the base's speed a fork in flight takes"
    )
    parser.add_argument("--service-scale", type=float, default=1.0, help="recorded service times times this")
    parser.add_argument(
        "--assume-service", nargs=2, type=float, metavar=("COMPILE_S", "GPU_S"), help="where none was recorded"
    )
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    options = parser.parse_args(arguments)
    if options.scores is None:
        options.scores = scores_near(options.traces)
    if options.service_times is None:
        options.service_times = [os.path.relpath(RESULTS / name) for name in IDLE_TIMES if (RESULTS / name).is_file()]
    for name in ("evaluators", "compilers", "max_forks"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if not all(0 < rate < 1e6 for rate in options.tokens_per_s):
        raise UsageError(f"--tokens-per-s {options.tokens_per_s}: rates must be above 0")
    if not 0 <= options.fork_slowdown < 1 or not 0 <= options.service_scale < 1e3:
        raise UsageError("--fork-slowdown must be in [0, 1) and --service-scale in [0, 1000)")
    for path in filter(None, (options.json, options.plot)):
        if not Path(path).resolve().parent.is_dir():
            raise UsageError(f"{path}: its folder doesn't exist; make it first")
    for policy in options.policies:
        if policy != "adaptive":
            parse_trigger(policy, "--policies")
        if any(name_of(part.strip()) == "entropy" for part in policy.split("+")):
            raise UsageError(f"--policies {policy!r}: recordings have no distribution to fork by; leave entropy out")
    return options


def collect(options: argparse.Namespace) -> tuple[list[Subject], list[dict[str, str]]]:
    """Scored subjects, and which iterations were left out and why."""
    traces, encode = load_traces(options.traces), tokenizer()
    assumed = Service(*options.assume_service) if options.assume_service else None
    times = read_service_times(options.service_times, kinds_of(traces))
    known = Measured(read_scores(options.scores), times, assumed, options.service_scale)
    subjects, skipped = [], []
    for trace in traces:
        for one in trace.iterations:
            try:
                subjects.append(subject_of(trace, one, known, encode))
            except UsageError as error:
                skipped.append(
                    {
                        "trace": f"{trace.path.resolve().parent.name}/{trace.name}/iter-{one.number}",
                        "reason": str(error),
                    }
                )
    if not subjects:
        raise UsageError(
            f"--traces: no iteration is scored ({skipped[0]['reason']}); pass --scores with their scores.json"
        )
    return subjects, skipped


def split_runs(subjects: Sequence[Subject]) -> tuple[list[Subject], dict[str, list[Subject]]]:
    """Single iterations, and searches of several scored ones by name."""
    groups: dict[str, list[Subject]] = defaultdict(list)
    for one in subjects:
        groups[f"{one.recording.family}/{one.recording.name.partition('/iter-')[0]}"].append(one)
    single = [one for group in groups.values() if len(group) == 1 for one in group]
    return single, {name: group for name, group in groups.items() if len(group) > 1}


def study_runs(
    runs: dict[str, list[Subject]], costs: adaptive.Costs, machine: Machine, spec: str, policies: Sequence[str]
) -> list[dict[str, Any]]:  # fmt: skip
    """Each run under every policy; adaptive starts with nothing learnt and keeps learning over the iterations."""
    rows = []
    for name, group in runs.items():
        study, families = Study(group, costs), dict[str, adaptive.Family]()
        plays: dict[str, Any] = {
            policy: (lambda index, policy=policy, study=study: study.play(policy, index, machine, spec))
            for policy in policies
            if policy != "adaptive"
        }
        if "adaptive" in policies:
            plays["adaptive"] = lambda index, study=study, families=families: study.adaptive(
                index, machine, spec, families
            )
        rows += run_rows(name, group, machine, spec, plays)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse_arguments(arguments)
        subjects, skipped = collect(options)
        single, runs = split_runs(subjects)
        costs = replace(adaptive.Costs(), slowdown=options.fork_slowdown)
        study, rows, run_table = Study(single, costs), [], []
        for rate in options.tokens_per_s:
            machine = Machine(
                rate, options.fork_slowdown, 0.1, options.max_forks, options.evaluators, options.compilers
            )
            for spec in options.criteria:
                for policy in options.policies:
                    rows += [study.row(policy, index, machine, spec) for index in range(len(single))]
                run_table += study_runs(runs, costs, machine, spec, options.policies)
    except (UsageError, TraceError, ValueError) as error:
        print(f"bench.policies: {error}", file=sys.stderr)
        return 2
    lines = summarise(rows)
    print_table(lines)
    for row in skipped:
        print(f"left out: {row['trace']}: {row['reason']}")
    if options.json:
        write_json(options, rows, lines, run_table, harvest_table(subjects), skipped)
    if options.plot:
        plot(lines, options.tokens_per_s[len(options.tokens_per_s) // 2], Path(options.plot))
    return 0


def harvest_table(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    trigger = parse_trigger("paragraph:min=800")
    return [
        harvest_row(one, [position for position, _ in fire_points(trigger, list(one.pieces))], 60.0) for one in subjects
    ]


def write_json(options: argparse.Namespace, rows: list, lines: list, runs: list, harvest: list, skipped: list) -> None:
    """The report, and the same as Markdown beside it. Virtual time is deterministic: the report's seed is null."""
    report = new_report(SCHEMA, None, "bench.policies")
    report["parameters"] = {name: value for name, value in vars(options).items() if name not in ("json", "plot")}
    report["rows"], report["summary"], report["skipped"] = rows, lines, skipped
    report["harvest"], report["runs"] = harvest, runs
    path = Path(options.json)
    write_report(path, report, markdown(report))


if __name__ == "__main__":
    sys.exit(main())

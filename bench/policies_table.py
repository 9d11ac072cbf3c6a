"""The offline study as Markdown: the oracle beside every policy, the trade-off, harvest, and runs of iterations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

NOTE = (
    "Simulated: recorded answers, statuses, speed-ups in virtual time; adaptive leaves out the trace it is judged on. "
    "gain: over sequential, geometric mean; a criterion never met counts 1.0. of oracle: share of the oracle's gain. "
    "cost: longest time over sequential on a trace where the criterion was never met."
)


def cell(value: Any, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]


def adaptive_lines(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Adaptive beside the oracle and the best fixed policy, a row a criterion and rate."""
    rows = []
    for criterion, rate in dict.fromkeys((line["criterion"], line["tokens_per_s"]) for line in lines):
        here = [line for line in lines if (line["criterion"], line["tokens_per_s"]) == (criterion, rate)]
        fixed = [line for line in here if line["policy"] != "adaptive"]
        mine = next((line for line in here if line["policy"] == "adaptive"), None)
        if mine is None or not fixed:
            continue
        best = max(fixed, key=lambda line: line["gain"])
        rows.append(
            (
                f"`{criterion}`", f"{rate:g}", mine["oracle_gain"], mine["gain"], f"{mine['share_of_oracle']:.0%}",
                f"`{best['policy']}`", best["gain"], mine["gain"] / best["gain"], cell(mine["unmet_cost"], 3),
            )
        )  # fmt: skip
    columns = ("criterion", "tokens/s", "oracle", "adaptive", "of oracle", "best fixed", "its gain", "ratio", "cost")
    return ["## adaptive, the oracle and the best fixed policy", *table(columns, rows)] if rows else []


def policy_lines(lines: Sequence[dict[str, Any]]) -> list[str]:
    columns = (
        "policy", "gain", "of oracle", "cost", "time / sequential", "accepted / final",
        "best / final at 25 / 50 / 75 / 100 % of the time", "met", "forks", "fork tokens", "fork tokens / verdict",
    )  # fmt: skip
    text: list[str] = []
    for criterion, rate in dict.fromkeys((line["criterion"], line["tokens_per_s"]) for line in lines):
        here = [line for line in lines if (line["criterion"], line["tokens_per_s"]) == (criterion, rate)]
        text += ["", f"## `{criterion}`, {rate:g} tokens/s: oracle {here[0]['oracle_gain']:.2f}x"]
        text += table(
            columns,
            (
                (
                    f"`{line['policy']}`", line["gain"], f"{line['share_of_oracle']:.0%}", cell(line["unmet_cost"], 3),
                    cell(line["time_over_sequential"], 3), line["accepted_over_final"],
                    " / ".join(cell(value) for value in line["best_over_final"].values()),
                    f"{line['met']}/{line['traces']}", f"{line['forks']:.1f}", f"{line['fork_tokens']:.0f}",
                    cell(line["fork_tokens_per_verdict"], 0),
                )
                for line in here
            ),
        )  # fmt: skip
    return text


def harvest_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = (
        "trace", "fences", "modules", "complete", "share", "drafts (ModelNew)", "verdicts before the next fork's",
        "no later fork", "median lead, s",
    )  # fmt: skip
    names = (
        "trace", "fences", "modules", "complete", "share_complete", "drafts", "verdicts_before_next_fork",
        "without_a_later_fork", "median_lead_s",
    )  # fmt: skip
    title = "## harvest: modules drafted whole in a reasoning, next fork by `paragraph:min=800`, 60 tokens/s"
    return ["", title, *table(columns, ([row[name] for name in names] for row in rows))]


def run_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = (
        "policy", "seconds", "gain", "tokens", "fork tokens", "best",
        "best at 25 / 50 / 75 / 100 % of sequential's time", "of its tokens", "verdicts",
    )  # fmt: skip
    text: list[str] = []
    for key in dict.fromkeys((row["run"], row["iterations"], row["criterion"], row["tokens_per_s"]) for row in rows):
        run, iterations, criterion, rate = key
        here = [row for row in rows if (row["run"], row["criterion"], row["tokens_per_s"]) == (run, criterion, rate)]
        text += ["", f"## {run}, {iterations} iterations, `{criterion}`, {rate:g} tokens/s"]
        text += table(
            columns,
            (
                (
                    f"`{row['policy']}`", f"{row['seconds']:.0f}", row["gain"], row["tokens"], row["fork_tokens"],
                    row["best"], " / ".join(map(cell, row["best_at_time"].values())),
                    " / ".join(map(cell, row["best_at_tokens"].values())), row["verdicts"],
                )
                for row in here
            ),
        )  # fmt: skip
    return text


def markdown(report: dict[str, Any]) -> str:
    lines = report["summary"]
    head = ["# Triggers and criteria on recorded traces", "", NOTE, "", f"`{report['command']}`", ""]
    parts = [*head, *adaptive_lines(lines), *harvest_lines(report["harvest"]), *run_lines(report["runs"])]
    return "\n".join([*parts, *policy_lines(lines)]) + "\n"

"""What ending forks early that write an earlier answer again would save and lose, on recorded answers in virtual time.

    python -m bench.policies_repeats --traces DIR... --json F

A replayed fork between two marks says the mark's answer again, word by word: what is saved is a property of replays,
not of a model. What is lost is not: distinct recorded answers that begin alike. Each recorded answer opens with a
sentence of its own, so they are read a second time without it, as from a model that goes straight to its code.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench import policies
from bench.machine import new_report, write_report
from bench.policies_table import table
from bench.recordings import Encode, Subject, UsageError, texts_of, tokenizer
from bench.virtual_time import Answer, Machine, Outcome, Recording, run_search
from specgen_engine.controller.answers import extract_candidate
from specgen_engine.controller.repeats import LEAST_TOKENS, Evidence, agreement, worth_ending
from specgen_engine.controller.termination import parse_termination
from specgen_engine.controller.triggers import fire_points, parse_trigger
from specgen_engine.evaluation.base import Status
from specgen_engine.replay.trace import Trace, TraceError, load_traces

SCHEMA = "specgen.policies_repeats/1"
TRIGGERS = ("paragraph:min=800", "every:400", "paragraph:min=200")
CRITERIA = ("speedup:1.5", "none")
FIXED = (64, 128, 256, 512, 1024)
WORTHS = (0.0, 1.0, 3.0, 10.0)
READINGS = ("as recorded", "code only")
LOOK_TOKENS = 32


class Fork(NamedTuple):
    """A fork that was made. at: its position; its evidence counts once the base has come past `whole_at`."""

    at: int
    ids: Sequence[int]
    whole_at: int
    agreed: int | None
    same: bool


Rule = Callable[["Player", int, int, int], bool]
"""(player, tokens that agree, tokens left, position): whether the fork is ended there."""


def fixed(least: int) -> Rule:
    return lambda player, agreed, left, position: agreed >= least


def learnt(worth: float) -> Rule:
    """What `fork.end_repeats: worth` runs."""

    def rule(player: Player, agreed: int, left: int, position: int) -> bool:
        spent, written = position + player.fork_tokens, len(player.written)
        return worth_ending(player.evidence, worth, agreed, left, spent, written)

    return rule


def never(player: Player, agreed: int, left: int, position: int) -> bool:
    return False


@dataclass
class Player:
    """A recording whose forks end early by a rule; it stands in for a Recording in run_search, for one search.

    said: token ids of each recorded answer. saved: tokens that the forks it ended would still have said.
    """

    recording: Recording
    said: dict[str, Sequence[int]]
    rule: Rule
    explores: bool
    evidence: Evidence = field(default_factory=Evidence)
    forks: list[Fork] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    dropped: dict[str, Answer] = field(default_factory=dict)
    fork_tokens: int = 0
    saved: int = 0
    repeats: int = 0
    ended: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recording, name)

    def answer_at(self, position: int) -> Answer | None:
        answer = self.recording.answer_at(position)
        if answer is None:
            return None
        self.learn(position)
        ids = self.said[answer.label]
        agreed = max((agreement(ids, fork.ids) for fork in self.forks), default=None)
        at = self._end(ids, agreed or 0, position)
        self.repeats += answer.hash in self.written
        if at is None:
            self.forks.append(Fork(position, ids, position + len(ids), agreed, answer.hash in self.written))
            self.written.add(answer.hash)
            self.fork_tokens += len(ids)
            return answer
        self.ended, self.saved, self.fork_tokens = self.ended + 1, self.saved + len(ids) - at, self.fork_tokens + at
        if answer.hash not in self.written:
            self.dropped[answer.hash] = answer
        # It gives no candidate: a failing one that takes no time stands for that, and is not counted.
        return Answer(f"ended-{self.ended}", f"ended-{self.ended}", at, Status.CANCELLED, None, 0.0, 0.0)

    def _end(self, ids: Sequence[int], agreed: int, position: int) -> int | None:
        """Tokens after which it is ended; one in WHOLE_EVERY of these is let go on where the rule learns."""
        looks = range(LEAST_TOKENS, min(agreed, len(ids) - 1) + 1, LOOK_TOKENS)
        at = next((tokens for tokens in looks if self.rule(self, tokens, len(ids) - tokens, position)), None)
        if at is None or not self.explores:
            return at
        self.evidence, really = self.evidence.chose()
        return at if really else None

    def learn(self, position: int) -> None:
        """From the forks that are whole when the base is there."""
        for number, fork in enumerate(self.forks):
            if fork.whole_at <= position and fork.agreed is not None:
                self.evidence = self.evidence.learnt(fork.agreed, fork.same)
                self.forks[number] = fork._replace(agreed=None)

    def lost(self) -> list[Answer]:
        """Distinct answers of which no fork was let write one whole."""
        return [answer for name, answer in self.dropped.items() if name not in self.written]


def said_in(texts: dict[str, str], reading: str, encode: Encode) -> dict[str, Sequence[int]]:
    """Token ids of each answer, by label."""
    if reading == READINGS[0]:
        return {label: encode(text)[0] for label, text in texts.items()}
    return {label: encode(extract_candidate(text) or text)[0] for label, text in texts.items()}


def texts_by_subject(traces: Sequence[Trace]) -> dict[tuple[str, str], dict[str, str]]:
    """Answers by the family and name of a recording."""
    found = {}
    for trace in traces:
        for one in trace.iterations:
            name = trace.name if len(trace.iterations) == 1 else f"{trace.name}/iter-{one.number}"
            found[trace.path.resolve().parent.name, name] = texts_of(one)
    return found


def shortened(recording: Recording, said: dict[str, Sequence[int]]) -> Recording:
    """With answers as long as they are read."""
    forks = tuple(answer._replace(tokens=len(said[answer.label])) for answer in recording.forks)
    return replace(recording, forks=forks)


def most_alike(name: str, forks: Sequence[Answer], said: dict[str, Sequence[int]]) -> dict[str, Any] | None:
    """Of two different fork answers of a recording, the most tokens at their beginnings in common; None without two."""
    pairs = [
        (agreement(said[one.label], said[other.label]), len(said[one.label]), one.label, other.label)
        for one, other in itertools.combinations(forks, 2)
        if one.hash != other.hash
    ]
    if not pairs:
        return None
    agreed, tokens, one, other = max(pairs)
    return {"trace": name, "tokens": agreed, "of": tokens, "answers": [one, other]}


class Played(NamedTuple):
    player: Player
    outcome: Outcome


def play(subject: Subject, said: dict[str, Sequence[int]], rule: Rule, explores: bool, evidence: Evidence,
         trigger: str, criterion: str, machine: Machine) -> Played:  # fmt: skip
    """One search by a rule, with what was learnt before it."""
    player = Player(shortened(subject.recording, said), said, rule, explores, evidence)
    points = [at for at, _ in fire_points(parse_trigger(trigger), list(subject.pieces))]
    outcome = run_search(player, machine, parse_termination(criterion), points)  # type: ignore[arg-type]
    player.learn(outcome.base_tokens)
    return Played(player, outcome)


def row_of(name: str, played: Sequence[Played]) -> dict[str, Any]:
    """What a rule saves and loses over all searches, which share what it learns."""
    lost = [answer for one in played for answer in one.player.lost()]
    tokens = sum(one.outcome.base_tokens + one.outcome.fork_tokens for one in played)
    correct = sum(one.outcome.correct for one in played)
    whole = sum(one.player.fork_tokens + one.player.saved for one in played)
    return {
        "rule": name,
        "searches": len(played),
        "forks": sum(one.outcome.forks for one in played),
        "repeats": sum(one.player.repeats for one in played),
        "ended": sum(one.player.ended for one in played),
        "fork_tokens": sum(one.outcome.fork_tokens for one in played),
        "saved_share": sum(one.player.saved for one in played) / whole if whole else 0.0,
        "kernels_lost": len(lost),
        "correct_lost": sum(answer.status is Status.CORRECT for answer in lost),
        "seconds": sum(one.outcome.seconds for one in played),
        "correct": correct,
        "correct_per_1000_tokens": 1_000 * correct / tokens,
        "accepted": [one.outcome.accepted.speedup if one.outcome.accepted else None for one in played],
    }


def study(
    subjects: Sequence[Subject], said: Sequence[dict[str, Sequence[int]]], trigger: str, criterion: str,
    machine: Machine,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every rule on all subjects, one after the other."""
    rules: dict[str, tuple[Rule, bool]] = {"never": (never, False)}
    rules |= {f"{least} tokens": (fixed(least), False) for least in FIXED}
    rules |= {f"worth {worth:g}": (learnt(worth), True) for worth in WORTHS}
    rows = []
    for name, (rule, explores) in rules.items():
        evidence, played = Evidence(), []
        for subject, ids in zip(subjects, said, strict=True):
            played.append(play(subject, ids, rule, explores, evidence, trigger, criterion, machine))
            evidence = played[-1].player.evidence
        rows.append(row_of(name, played))
    return rows


def quality(row: dict[str, Any], base: dict[str, Any]) -> float:
    """Accepted speed-ups over those of another rule's, geometric mean; a search that has none of either is left out."""
    pairs = [(mine, other) for mine, other in zip(row["accepted"], base["accepted"], strict=True) if mine and other]
    return statistics.geometric_mean(mine / other for mine, other in pairs)


def tokens_of(row: dict[str, Any]) -> int:
    return row["tokens"]


def markdown(report: dict[str, Any]) -> str:
    columns = (
        "trigger", "criterion", "answers", "rule", "forks", "repeats", "ended", "fork tokens", "of them saved",
        "kernels lost", "correct ones", "accepted / never", "time / never", "correct per 1,000 tokens",
    )  # fmt: skip
    rows = []
    for row in report["rows"]:
        base = next(
            one for one in report["rows"] if one["rule"] == "never" and all(
                one[key] == row[key] for key in ("trigger", "criterion", "reading")
            )
        )  # fmt: skip
        rows.append(
            (
                f"`{row['trigger']}`", f"`{row['criterion']}`", row["reading"], row["rule"], row["forks"],
                row["repeats"], row["ended"], row["fork_tokens"], f"{row['saved_share']:.0%}", row["kernels_lost"],
                row["correct_lost"], f"{quality(row, base):.3f}", f"{row['seconds'] / base['seconds']:.3f}",
                f"{row['correct_per_1000_tokens']:.3f}",
            )
        )  # fmt: skip
    rate = report["parameters"]["tokens_per_s"]
    note = (
        f"Simulated: recorded answers in virtual time, at {rate:g} tokens/s. A replay's forks repeat by construction. "
        "`worth W` is what `fork.end_repeats: W` runs; it begins with no evidence and carries it from search to search."
    )
    alike = [
        f"Different answers of a search, {reading}: at most {most['tokens']} tokens in common at their beginning, of "
        f"{most['of']} ({most['trace']})."
        for reading in READINGS
        if (
            most := max((one for one in report["most_alike"] if one["reading"] == reading), default=None, key=tokens_of)
        )
    ]
    return "\n".join([f"# {report['schema']}", "", note, "", *alike, "", *table(columns, rows), ""])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.policies_repeats")
    parser.add_argument("--traces", nargs="+", required=True, metavar="DIR", help="task folders, or folders of them")
    parser.add_argument("--scores", nargs="*", metavar="F", help="scores (default: scores.json near DIR)")
    parser.add_argument("--json", metavar="F", help=f"report, schema {SCHEMA}, and the same as Markdown beside it")
    parser.add_argument("--tokens-per-s", type=float, default=60.0)
    parser.add_argument("--triggers", nargs="+", default=list(TRIGGERS))
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA))
    parser.add_argument("--reverse", action="store_true", help="the searches in the opposite order")
    options = parser.parse_args(arguments)
    if not 0 < options.tokens_per_s < 1e6:
        raise UsageError(f"--tokens-per-s {options.tokens_per_s:g}: must be above 0")
    return checked(options)


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The same. Raises UsageError for a --json that can't be written, ValueError for a trigger that is none."""
    if options.json and not Path(options.json).resolve().parent.is_dir():
        raise UsageError(f"--json {options.json}: its folder doesn't exist; make it first")
    for spec in options.triggers:
        parse_trigger(spec, "--triggers")
    return options


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    words = ["--traces", *options.traces, *(["--scores", *options.scores] if options.scores else [])]
    subjects, skipped = policies.collect(policies.parse_arguments(words))
    subjects = subjects[::-1] if options.reverse else subjects
    texts, encode = texts_by_subject(load_traces(options.traces)), tokenizer()
    report = new_report(SCHEMA, None, "bench.policies_repeats")
    report["parameters"] = {name: value for name, value in vars(options).items() if name != "json"}
    report["skipped"], report["rows"], report["most_alike"] = skipped, [], []
    machine = Machine(options.tokens_per_s)
    for reading in READINGS:
        said = [said_in(texts[one.recording.family, one.recording.name], reading, encode) for one in subjects]
        alike = [
            most_alike(f"{one.recording.family}/{one.recording.name}", one.recording.forks, ids)
            for one, ids in zip(subjects, said, strict=True)
        ]
        report["most_alike"] += [{"reading": reading} | found for found in alike if found]
        for trigger in options.triggers:
            for criterion in options.criteria:
                about = {"trigger": trigger, "criterion": criterion, "reading": reading}
                report["rows"] += [about | row for row in study(subjects, said, trigger, criterion, machine)]
    return report


def run(
    name: str, reported: Callable[[], tuple[dict[str, Any], str | None]], markdown: Callable[[dict[str, Any]], str]
) -> int:
    """A bench's exit status: its report printed and, where a file is named, written; or what was asked wrongly."""
    try:
        report, path = reported()
    except (UsageError, TraceError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    text = markdown(report)
    print(text)
    if path:
        write_report(Path(path), report, text)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    def report() -> tuple[dict[str, Any], str | None]:
        options = parse_arguments(arguments)
        return report_of(options), options.json

    return run("bench.policies_repeats", report, markdown)


if __name__ == "__main__":
    sys.exit(main())

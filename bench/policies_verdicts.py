"""Distinct correct verdicts per engine token over sequential's: what triggers and ending repeats bring (virtual time).

    python -m bench.policies_verdicts --traces DIR... --leave-out glm51/topk --json F

Every row is played twice. *replayed*: a fork between two marks says the mark's answer again, word by word, as on a
replaying server. *each its own*: every fork says an answer that nobody said, as long, as right and as fast as the
mark's, as a model does that never repeats itself; then nothing is ended as a repeat. A model lies between the two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench import policies
from bench.machine import new_report
from bench.policies_repeats import READINGS, Player, Rule, checked, learnt, never, run, said_in, texts_by_subject
from bench.policies_table import table
from bench.recordings import Subject, UsageError, tokenizer
from bench.virtual_time import Answer, Machine, Outcome, Recording, run_search, sequential
from specgen_engine.controller.repeats import Evidence
from specgen_engine.controller.termination import Speedup
from specgen_engine.controller.triggers import fire_points, parse_trigger
from specgen_engine.replay.trace import load_traces

SCHEMA = "specgen.policies_verdicts/1"
TRIGGERS = tuple(f"paragraph:min={least}{new}" for least in (800, 600, 1000, 1200) for new in ("", ":new=code"))
WORTHS = (None, 0.0, 1.0, 3.0)
CONDITIONS = ("60", "138", "138:64")
FORKS_IN_FLIGHT = 4
CUDA_S = 10.0
"""Of compiling, above which an answer is one in CUDA."""

Said = dict[str, Sequence[int]]


class Condition(NamedTuple):
    """rate: tokens a second of one request; cuda_s: of compiling CUDA, None: as measured on an idle machine."""

    name: str
    rate: float
    cuda_s: float | None

    def subject(self, one: Subject) -> Subject:
        forks = tuple(map(self._answer, one.recording.forks))
        return replace(one, recording=replace(one.recording, forks=forks, final=self._answer(one.recording.final)))

    def _answer(self, answer: Answer) -> Answer:
        if self.cuda_s is None or answer.compile_s <= CUDA_S:
            return answer
        return answer._replace(compile_s=self.cuda_s)


def condition_of(text: str) -> Condition:
    """From RATE or RATE:CUDA_S."""
    rate, _, cuda = text.partition(":")
    try:
        found = Condition(text, float(rate), float(cuda) if cuda else None)
    except ValueError:
        raise UsageError(f"--conditions {text!r}: give RATE or RATE:CUDA_SECONDS, as in 138:64") from None
    if not 0 < found.rate < 1e6 or (found.cuda_s is not None and not 0 < found.cuda_s < 1e6):
        raise UsageError(f"--conditions {text!r}: both numbers must be above 0")
    return found


@dataclass
class EachItsOwn:
    """A recording none of whose forks says what another said; it stands in for one in run_search."""

    recording: Recording
    forks_made: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recording, name)

    def answer_at(self, position: int) -> Answer | None:
        answer = self.recording.answer_at(position)
        self.forks_made += 1
        return answer and answer._replace(hash=f"{answer.hash}-{self.forks_made}")


class Searches(NamedTuple):
    """The same searches by a policy and sequentially."""

    outcomes: list[Outcome]
    alone: list[Outcome]

    def of(self, kept: Sequence[bool]) -> Searches:
        return Searches(*([one for one, keep in zip(group, kept, strict=True) if keep] for group in self))

    def over_sequential(self) -> float:
        """Correct per engine token, over sequential's."""
        return per_1000(self.outcomes) / per_1000(self.alone)

    def gain(self, target: float) -> float:
        """To the target, geometric mean; 1.0 where it is not met."""
        met = [one.accepted is not None and (one.accepted.speedup or 0.0) >= target for one in self.outcomes]
        pairs = zip(self.alone, self.outcomes, met, strict=True)
        return statistics.geometric_mean(alone.seconds / one.seconds if ok else 1.0 for alone, one, ok in pairs)


def per_1000(outcomes: Sequence[Outcome]) -> float:
    tokens = sum(one.base_tokens + one.fork_tokens for one in outcomes)
    return 1_000 * sum(one.correct for one in outcomes) / tokens


def searched(
    subjects: Sequence[Subject], said: Sequence[Said], trigger: str, worth: float | None, own: bool, machine: Machine,
    target: float,
) -> Searches:  # fmt: skip
    """All subjects one after the other on a server that knows nothing at first. own: every fork says its own answer."""
    rule: Rule = never if worth is None else learnt(worth)
    evidence, outcomes, alone = Evidence(), [], []
    for subject, ids in zip(subjects, said, strict=True):
        points = [at for at, _ in fire_points(parse_trigger(trigger), list(subject.pieces))]
        player = Player(subject.recording, ids, rule, worth is not None, evidence)
        played = EachItsOwn(subject.recording) if own else player
        outcomes.append(run_search(played, machine, Speedup(target), points))  # type: ignore[arg-type]
        player.learn(outcomes[-1].base_tokens)
        evidence = player.evidence
        alone.append(sequential(subject.recording, machine))
    return Searches(outcomes, alone)


def row_of(searches: Searches, families: Sequence[str], target: float) -> dict[str, Any]:
    outcomes = searches.outcomes
    return {
        "forks": sum(one.forks for one in outcomes),
        "correct": sum(one.correct for one in outcomes),
        "base_tokens": sum(one.base_tokens for one in outcomes),
        "fork_tokens": sum(one.fork_tokens for one in outcomes),
        "correct_per_1000_tokens": per_1000(outcomes),
        "over_sequential": searches.over_sequential(),
        "by_group": {
            family: searches.of([one == family for one in families]).over_sequential()
            for family in dict.fromkeys(families)
        },
        "gain": searches.gain(target),
    }


def study(
    subjects: Sequence[Subject], said: Sequence[Said], conditions: Sequence[Condition], triggers: Sequence[str],
    target: float,
) -> list[dict[str, Any]]:  # fmt: skip
    families, rows = [one.recording.family for one in subjects], []
    for condition in conditions:
        machine = Machine(condition.rate, max_forks=FORKS_IN_FLIGHT)
        here = [condition.subject(one) for one in subjects]
        for trigger in triggers:
            for worth in WORTHS:
                about = {"condition": condition.name, "trigger": trigger, "end_repeats": worth}
                replayed = searched(here, said, trigger, worth, False, machine, target)
                own = searched(here, said, trigger, worth, True, machine, target)
                figures = {"replayed": row_of(replayed, families, target), "own": row_of(own, families, target)}
                rows.append(about | {"sequential_per_1000": per_1000(replayed.alone)} | figures)
    return rows


def markdown(report: dict[str, Any]) -> str:
    groups = list(report["rows"][0]["replayed"]["by_group"])
    columns = (
        "tokens/s:CUDA s", "trigger", "end_repeats", "forks", "correct", "base tokens", "fork tokens",
        "correct per 1,000 tokens", "over sequential", *(f"{group}" for group in groups), "gain",
        "each its own: correct", "fork tokens", "over sequential", "gain",
    )  # fmt: skip
    rows = []
    for row in report["rows"]:
        one, own = row["replayed"], row["own"]
        alone = row["end_repeats"] is None
        rows.append(
            (
                row["condition"], f"`{row['trigger']}`", "-" if alone else f"{row['end_repeats']:g}", one["forks"],
                one["correct"], one["base_tokens"], one["fork_tokens"], f"{one['correct_per_1000_tokens']:.3f}",
                f"{one['over_sequential']:.2f}", *(f"{one['by_group'][group]:.2f}" for group in groups),
                f"{one['gain']:.2f}",
                *((own["correct"], own["fork_tokens"], f"{own['over_sequential']:.2f}", f"{own['gain']:.2f}")
                  if alone else ("", "", "", "")),
            )
        )  # fmt: skip
    note = (
        f"Simulated: recorded answers in virtual time, {report['searches']} searches, one after the other on a server "
        f"that knows nothing at first, target {report['parameters']['target']:g}x. Tokens: base and forks. gain: to "
        "the target, geometric mean. What end_repeats saves is the replay's property: there a fork between two marks "
        "repeats by construction. *each its own*: no fork repeats another, so it ends none."
    )
    return "\n".join([f"# {report['schema']}", "", f"`{report['command']}`", "", note, "", *table(columns, rows), ""])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.policies_verdicts")
    parser.add_argument("--traces", nargs="+", required=True, metavar="DIR", help="task folders, or folders of them")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="FOLDER/TASK", help="traces that are not played")
    parser.add_argument("--scores", nargs="*", metavar="F", help="scores (default: scores.json near DIR)")
    parser.add_argument("--json", metavar="F", help=f"report, schema {SCHEMA}, and the same as Markdown beside it")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), metavar="RATE[:CUDA_S]")
    parser.add_argument("--triggers", nargs="+", default=list(TRIGGERS))
    parser.add_argument("--target", type=float, default=1.5, help="speed-up that ends a search")
    parser.add_argument("--reverse", action="store_true", help="the searches in the opposite order")
    options = parser.parse_args(arguments)
    if not 0 < options.target < 1e5:
        raise UsageError(f"--target {options.target:g}: must be above 0")
    return checked(options)


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    conditions = [condition_of(text) for text in options.conditions]
    words = ["--traces", *options.traces, *(["--scores", *options.scores] if options.scores else [])]
    subjects, skipped = policies.collect(policies.parse_arguments(words))
    names = {f"{one.recording.family}/{one.recording.name}" for one in subjects}
    if unknown := [name for name in options.leave_out if name not in names]:
        raise UsageError(f"--leave-out {unknown[0]!r}: not among the traces; use some of {', '.join(sorted(names))}")
    subjects = [one for one in subjects if f"{one.recording.family}/{one.recording.name}" not in options.leave_out]
    subjects = subjects[::-1] if options.reverse else subjects
    if not subjects:
        raise UsageError("--leave-out: no trace is left; leave out fewer")
    texts, encode = texts_by_subject(load_traces(options.traces)), tokenizer()
    said = [said_in(texts[one.recording.family, one.recording.name], READINGS[0], encode) for one in subjects]
    report = new_report(SCHEMA, None, "bench.policies_verdicts")
    report["parameters"] = {name: value for name, value in vars(options).items() if name != "json"}
    report["skipped"], report["searches"] = skipped, len(subjects)
    report["rows"] = study(subjects, said, conditions, options.triggers, options.target)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    def report() -> tuple[dict[str, Any], str | None]:
        options = parse_arguments(arguments)
        return report_of(options), options.json

    return run("bench.policies_verdicts", report, markdown)


if __name__ == "__main__":
    sys.exit(main())

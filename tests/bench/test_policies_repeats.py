"""The study of forks that repeat an answer: what a rule saves and loses on made-up recordings."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.policies_repeats import Player, Rule, fixed, learnt, most_alike, never, play, quality, row_of, study
from bench.recordings import Subject
from bench.virtual_time import Answer, Machine, Recording
from specgen_engine.controller.repeats import WHOLE_EVERY, Evidence
from specgen_engine.evaluation.base import Status

FIRST, ALIKE = tuple(range(400)), (*range(300), *range(1_000, 1_100))
OTHER = tuple(range(2_000, 2_400))
MACHINE = Machine(60.0)


def answer(label: str, tokens: int = 400, speedup: float | None = 1.2) -> Answer:
    return Answer(label, f"hash-{label}", tokens, Status.CORRECT if speedup else Status.WRONG, speedup, 1.0, 1.0)


def subject(*marks: int, tokens: int = 8_000) -> Subject:
    forks = tuple(answer(f"fork-{number}") for number in range(1, len(marks) + 1))
    recording = Recording("t", "f", tokens, marks, forks, answer("final", speedup=2.0))
    return Subject(recording, ("x",) * tokens, "", {})


def player(said: Sequence[Sequence[int]], rule: Rule, explores: bool = False) -> Player:
    one = subject(*range(0, 1_000 * len(said), 1_000))
    ids = {f"fork-{number}": tokens for number, tokens in enumerate(said, 1)}
    return Player(one.recording, ids, rule, explores)


def test_a_repeat_is_ended_at_the_first_look_past_the_least() -> None:
    one = player([FIRST, OTHER], fixed(100))
    assert one.answer_at(0) == answer("fork-1")
    ended = one.answer_at(500)
    assert ended is not None
    assert (ended.tokens, ended.hash, ended.compile_s) == (128, "ended-1", 0.0)
    assert one.answer_at(1_000) == answer("fork-2")
    assert (one.repeats, one.ended, one.saved, one.lost()) == (1, 1, 400 - 128, [])
    assert one.fork_tokens == 400 + 128 + 400


@pytest.mark.parametrize(("least", "lost"), [(256, ["fork-2"]), (320, [])])
def test_an_answer_that_begins_like_another_is_lost_to_a_rule_that_looks_too_little(least: int, lost: list) -> None:
    one = player([FIRST, ALIKE], fixed(least))
    one.answer_at(0)
    for position in (1_000, 1_400):
        one.answer_at(position)
    assert [gone.label for gone in one.lost()] == lost
    assert one.ended == (2 if lost else 1), "the second repeat of one that was written is no loss"


def test_an_answer_that_a_later_fork_wrote_whole_is_not_lost() -> None:
    one = player([FIRST, ALIKE], fixed(256), explores=True)
    one.evidence = Evidence(chosen=WHOLE_EVERY - 2)
    for position in (0, 1_000, 1_400):
        one.answer_at(position)
    assert (one.ended, one.lost()) == (1, []), "the second to be ended is the one in eight that is let go on"


def test_evidence_counts_once_the_fork_is_whole() -> None:
    one = player([FIRST, OTHER], never, explores=True)
    for position in (0, 500, 800):
        one.answer_at(position)
    assert one.evidence.seen == (), "the second is whole at 900"
    one.learn(900)
    assert one.evidence.seen == ((400, True),)
    one.learn(10_000)
    assert one.evidence.seen == ((400, True), (400, True))


def test_the_learnt_rule_ends_nothing_before_it_has_seen_repeats() -> None:
    one = player([FIRST], learnt(3.0), explores=True)
    for position in range(0, 2_000, 100):
        one.answer_at(position)
    assert one.ended == 0, "what a kernel costs grows with every fork that repeats"
    sure = Evidence()
    for _ in range(200):
        sure = sure.learnt(400, True)
    one = player([FIRST], learnt(3.0), explores=True)
    one.evidence = sure
    for position in range(0, 2_000, 100):
        one.answer_at(position)
    assert one.ended > 10


def test_a_search_in_virtual_time_takes_the_shortened_forks_and_counts_no_kernel_for_them() -> None:
    one = subject(0, 4_000)
    said = {"fork-1": FIRST, "fork-2": OTHER, "final": OTHER}
    plain, cut = (
        play(one, said, rule, False, Evidence(), "every:1000", "none", MACHINE) for rule in (never, fixed(64))
    )
    assert plain.outcome.correct == cut.outcome.correct == 3
    assert plain.outcome.forks == cut.outcome.forks == 8
    spared = plain.outcome.fork_tokens - cut.outcome.fork_tokens
    unfinished = MACHINE.prefill_s * MACHINE.tokens_per_s  # of the last, made where the base begins its own answer
    assert spared == pytest.approx(6 * (400 - 64) - unfinished, abs=2)
    assert cut.player.saved == 6 * (400 - 64)
    row = row_of("64 tokens", [cut])
    assert (row["repeats"], row["ended"], row["kernels_lost"], row["correct"]) == (6, 6, 0, 3)
    assert cut.outcome.seconds < plain.outcome.seconds


def test_the_two_that_are_most_alike_are_named() -> None:
    forks = [answer(f"fork-{number}") for number in (1, 2, 3)]
    said = {"fork-1": FIRST, "fork-2": OTHER, "fork-3": ALIKE}
    assert most_alike("t", forks, said) == {
        "trace": "t", "tokens": 300, "of": 400, "answers": ["fork-1", "fork-3"],
    }  # fmt: skip
    same = answer("fork-3")._replace(hash="hash-fork-1")
    found = most_alike("t", [*forks[:2], same], said)
    assert found is not None
    assert found["tokens"] == 0, "one and the same kernel is no pair"
    assert most_alike("t", forks[:1], said) is None


def test_quality_compares_the_searches_that_both_ended_with_a_kernel() -> None:
    assert quality({"accepted": [2.0, None, 4.0]}, {"accepted": [1.0, 3.0, 2.0]}) == pytest.approx(2.0)


def test_all_rules_see_the_same_searches() -> None:
    said = {"fork-1": FIRST, "fork-2": ALIKE, "final": OTHER}
    rows = {row["rule"]: row for row in study([subject(0, 4_000)], [said], "every:1000", "none", MACHINE)}
    assert list(rows) == [
        "never",
        "64 tokens",
        "128 tokens",
        "256 tokens",
        "512 tokens",
        "1024 tokens",
        "worth 0",
        "worth 1",
        "worth 3",
        "worth 10",
    ]
    assert [rows[name]["kernels_lost"] for name in ("never", "256 tokens", "512 tokens", "worth 0")] == [0, 1, 0, 1]
    assert {row["searches"] for row in rows.values()} == {1}

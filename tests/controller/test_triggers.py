"""Triggers fire at the token that completes their pattern, however the text is cut into tokens."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller import triggers
from specgen_engine.controller.entropy import top_k_entropy
from specgen_engine.controller.triggers import fire_points, parse_trigger

TEXT = """First thoughts on the row.

```cpp
int a;

int b;
```

Wait, that is slow. Let me count again. The wait is long.

~~~python
class ModelNew:
    pass
~~~
Done.

"""


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[turn % len(sizes)]])
        at += sizes[turn % len(sizes)]
        turn += 1
    return pieces


def fired_texts(spec: str, text: str, sizes: list[int]) -> list[str]:
    """The text before each firing, one character a token unless sizes says otherwise."""
    pieces = cut(text, sizes)
    return ["".join(pieces[:position]) for position, _ in fire_points(parse_trigger(spec), pieces)]


def test_every_n_fires_at_its_multiples() -> None:
    assert fire_points(parse_trigger("every:3"), ["x"] * 10) == [(3, "every:3"), (6, "every:3"), (9, "every:3")]


def test_paragraph_is_a_blank_line_outside_fences() -> None:
    ends = [end[-9:] for end in fired_texts("paragraph", TEXT, [1])]
    assert ends == ["he row.\n\n", " b;\n```\n\n"[-9:], "s long.\n\n"[-9:], "~\nDone.\n\n"[-9:]]


def test_more_blank_lines_are_one_paragraph_end_and_leading_ones_none() -> None:
    assert fired_texts("paragraph", "\n\n\na\n \n\n\nb\r\n\r\nc", [1]) == ["\n\n\na\n \n", "\n\n\na\n \n\n\nb\r\n\r\n"]


def test_one_token_may_end_a_paragraph_and_start_the_next() -> None:
    assert fire_points(parse_trigger("paragraph"), ["a", ".\n\nb", "\n", "\n"]) == [(2, "paragraph"), (4, "paragraph")]


def test_fence_fires_when_its_closing_line_ends() -> None:
    assert [end[-9:] for end in fired_texts("fence", TEXT, [1])] == ["nt b;\n```\n"[-9:], "pass\n~~~\n"]


def test_a_shorter_or_other_fence_inside_does_not_close() -> None:
    assert fired_texts("fence", "````\n```\n~~~~\n````\n", [1]) == ["````\n```\n~~~~\n````\n"]
    assert fired_texts("fence", "```py\n```py\n", [1]) == []
    assert fired_texts("fence", "```not a fence``` here\n```\nx\n```\n", [1]) == [
        "```not a fence``` here\n```\nx\n```\n"
    ]


def test_draft_needs_a_closed_fence_with_model_new() -> None:
    assert [end[-4:] for end in fired_texts("draft", TEXT, [1])] == ["~~~\n"]
    assert fired_texts("draft", "class ModelNew\n```\nx = 1\n```\n", [1]) == []
    assert fired_texts("draft", "```\nclass ModelNew:\n", [1]) == []
    assert len(fired_texts("draft", "```\nclass ModelNew:\n```\n```\nx\n```\n", [1])) == 1


def test_transition_words_count_at_a_sentence_start_only() -> None:
    ends = fired_texts("transition", TEXT, [1])
    assert [end[-7:] for end in ends] == ["\n\nWait,", "Let me "]
    assert fired_texts("transition", "Waiting. Letter. I wait. 3.wait x. See v0.5 wait here", [1]) == []
    assert len(fired_texts("transition", "Actually no\n- **Alternatively**, yes", [3])) == 2


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from(["paragraph", "fence", "draft", "transition"]),
)
def test_cutting_the_text_otherwise_moves_a_firing_to_the_end_of_its_token_only(sizes: list[int], spec: str) -> None:
    exact = [len(text) for text in fired_texts(spec, TEXT, [1])]
    ends = [len("".join(cut(TEXT, sizes)[: n + 1])) for n in range(len(cut(TEXT, sizes)))]
    expected = sorted({next(end for end in ends if end >= at) for at in exact})
    assert [len(text) for text in fired_texts(spec, TEXT, sizes)] == expected


@given(st.lists(st.text(max_size=8), max_size=60))
def test_no_text_makes_a_trigger_raise_and_states_are_values(pieces: list[str]) -> None:
    joined = parse_trigger("every:7+paragraph:min=5:new=code+fence+draft+transition")
    assert fire_points(joined, pieces) == fire_points(joined, pieces)


def test_min_keeps_firings_apart_and_counts_from_the_start() -> None:
    pieces = ["a", "\n\n"] * 10
    assert [at for at, _ in fire_points(parse_trigger("paragraph:min=5"), pieces)] == [6, 12, 18]
    assert [at for at, _ in fire_points(parse_trigger("paragraph:min=6"), pieces)] == [6, 12, 18]


CODE, PROSE = ["```", "\n", "x", "\n", "```", "\n", "\n"], ["a", "\n\n"]


@pytest.mark.parametrize(
    ("pieces", "points"),
    [
        (PROSE * 2 + CODE + PROSE * 4, [11]),  # the paragraphs before the code, and those after it, bring none
        (PROSE * 2 + CODE + PROSE * 2 + CODE, [11, 22]),
        (CODE + PROSE, [7]),
        (["```", "\n", "x", "\n"] + PROSE * 2, []),  # it never closes
        (CODE[:-1] + ["b", "\n\n"] + PROSE * 8, [8, 20]),  # three times the least distance on, without any
        (PROSE * 12, [12, 24]),
    ],
)
def test_new_code_keeps_back_where_no_fence_has_closed_since_the_firing_before(
    pieces: list[str], points: list[int]
) -> None:
    plain, new = parse_trigger("paragraph:min=4"), parse_trigger("paragraph:min=4:new=code")
    assert fire_points(new, pieces) == [(at, "paragraph:min=4:new=code") for at in points]
    assert len(fire_points(plain, pieces)) >= len(points)
    assert fire_points(parse_trigger("paragraph:new=code:min=4"), pieces) == [
        (at, "paragraph:new=code:min=4") for at in points
    ]


def test_new_code_of_one_of_the_joined_is_asked_of_it_alone() -> None:
    joined = parse_trigger("paragraph:min=3:new=code + every:6")
    points = fire_points(joined, PROSE * 2 + CODE + PROSE)
    assert points == [(6, "every:6"), (11, "paragraph:min=3:new=code"), (12, "every:6")]


def test_joined_triggers_name_the_one_that_fired_and_share_the_distance() -> None:
    pieces = ["a", "\n\n"] * 5
    points = fire_points(parse_trigger("every:3 + paragraph:min=3"), pieces)
    assert points == [(3, "every:3"), (6, "every:3"), (9, "every:3")]
    assert fire_points(parse_trigger("fence+every:4"), pieces) == [(4, "every:4"), (8, "every:4")]


def test_none_never_fires() -> None:
    assert fire_points(parse_trigger("none"), [TEXT]) == []


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("", "every:400"),
        ("every", "every:400"),
        ("every:0", "from 1"),
        ("every:-4", "from 1"),
        ("every:4.5", "from 1"),
        ("every:²", "from 1"),
        ("paragraph:", "takes no argument"),
        ("paragraph:min=", "min="),
        ("paragraph:min=0", "min="),
        ("paragraph:min=3:min=4", "given once"),
        ("paragraph:new=code", "needs min=N"),
        ("paragraph:min=4:new=prose", "needs code"),
        ("paragraph:new=code:min=4:new=code", "given once"),
        ("fence:7", "takes no argument"),
        ("sentence", "use one of"),
        ("paragraph++fence", "empty part"),
        ("none+fence", "alone"),
    ],
)
def test_a_bad_spec_is_one_error_with_field_value_and_remedy(spec: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as caught:
        parse_trigger(spec, field="specgen.trigger")
    assert str(caught.value).startswith(f"specgen.trigger={spec!r}: ")
    assert "\n" not in str(caught.value)


class Point:
    name = "shouting"

    def load(self):
        return lambda argument: triggers.EveryN(len(argument or "x"))


def test_plug_ins_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str, name: str | None = None) -> list[Point]:
        return [Point()] if group == "specgen.triggers" and name in (None, "shouting") else []

    monkeypatch.setattr(triggers, "entry_points", points)
    assert fire_points(parse_trigger("shouting:abcd:min=5"), ["x"] * 16) == [
        (8, "shouting:abcd:min=5"),
        (16, "shouting:abcd:min=5"),
    ]
    assert "shouting" in triggers.trigger_names()


@pytest.mark.parametrize("spec", ["every:400", "paragraph", "fence", "draft", "transition"])
def test_a_step_is_cheap(spec: str) -> None:
    """The scheduler steps every request's trigger on every decoded token: 2 us typical, more on a busy CPU."""
    pieces = cut(TEXT * 40, [4, 3, 5])
    trigger = parse_trigger(spec)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        fire_points(trigger, pieces)
        best = min(best, (time.perf_counter() - began) / len(pieces))
    print(f"{spec}: {best * 1e6:.2f} us a token")
    assert best < 6e-6


def test_entropy_fires_where_the_distribution_is_flat_and_only_there() -> None:
    flat, sharp = [-2.0] * 8, [-0.01, -9.0, -9.0]
    assert top_k_entropy(flat) == pytest.approx(math.log(8))
    assert top_k_entropy(sharp) < 0.01
    assert top_k_entropy([]) == 0.0
    trigger = parse_trigger("entropy:1:min=3+every:100")
    assert triggers.wanted_logprobs(trigger) == 8
    state, fired = trigger.start(), []
    for position, logprobs in enumerate([flat, sharp, sharp, flat, flat, flat, flat], 1):
        state = triggers.weighed(trigger, state, top_k_entropy(logprobs))
        state, name = trigger.step(state, "x", position)
        fired += [(position, name)] if name else []
    assert fired == [(4, "entropy:1:min=3"), (7, "entropy:1:min=3")]


def test_entropy_is_silent_on_recorded_text_and_costs_other_triggers_nothing() -> None:
    assert fire_points(parse_trigger("entropy:0.1"), ["a"] * 50) == []
    plain = parse_trigger("paragraph:min=3+fence")
    assert triggers.wanted_logprobs(plain) == 0
    assert triggers.weighed(plain, plain.start(), 2.0) == plain.start()


@pytest.mark.parametrize("spec", ["entropy", "entropy:x", "entropy:0", "entropy:2.2", "entropy:nan"])
def test_entropy_needs_nats_that_eight_tokens_can_reach(spec: str) -> None:
    with pytest.raises(ValueError, match=r"nats above 0 and below 2\.08"):
        parse_trigger(spec)

"""The base as read so far: when its thinking is closed, what its answer is, and the cut before a lost one."""

from __future__ import annotations

import pytest

from specgen_engine.controller.base_request import BaseRequest
from specgen_engine.controller.thinking import PLAIN, STYLES, ThinkingStyle
from tests.controller.fakes import output


def base(style: ThinkingStyle = STYLES["qwen3"], opened: bool = True) -> BaseRequest:
    return BaseRequest(style, opened, lambda text: [ord(c) for c in text])


def test_a_closing_mark_that_comes_in_pieces_closes_the_thinking() -> None:
    one = base()
    closed = []
    for text in ("so", "so</th", "so</think", "so</think>", "so</think>An"):
        assert one.take(output(text)) is None
        closed.append(one.has_closed_thinking)
    assert closed == [False, False, False, True, True]
    assert (one.answer(), one.answer_tokens(), one.tokens) == ("An", 2, len("so</think>An"))


def test_text_that_was_read_is_not_read_again() -> None:
    one = base()
    for text in ("ink></th", "ink></th and"):
        one.take(output(text))
    assert not one.has_closed_thinking


def test_a_model_without_marks_never_closes_its_thinking() -> None:
    one = base(PLAIN)
    one.take(output("so</think>An"))
    assert not one.has_closed_thinking
    assert (one.answer(), one.answer_tokens()) == (None, 0)


def test_it_is_done_with_its_last_step() -> None:
    one = base()
    one.take(output("so"))
    assert not one.done
    assert one.take(output("so on", {"type": "stop"})) == {"type": "stop"}
    assert one.done


@pytest.mark.parametrize("text", ["so\n</think>\n\nAnswer", "so</think>", "so</think>A</think>B"])
def test_a_dropped_answer_leaves_ids_and_text_of_the_open_thinking(text: str) -> None:
    one = base()
    one.take(output(text))
    kept = one.drop_answer()
    assert (kept.text, kept.ids) == ("so", [ord("s"), ord("o")])
    assert (one.answer(), one.tokens) == (None, 2)


def test_a_thinking_that_is_open_has_no_answer_to_drop() -> None:
    one = base()
    one.take(output("so on\n"))
    assert one.drop_answer().text == "so on\n"

"""Thinking styles come from the parser or the template; the phase machine survives any cut into tokens.

The template lines are those of the published chat templates of DeepSeek-R1, DeepSeek-V3.1, GLM-4.6 and Qwen3.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller.thinking import (
    PLAIN,
    STYLES,
    Phase,
    ReasoningPhase,
    fork_suffix,
    prompt_opens_thinking,
    split_thinking,
    style_of,
)

DEEPSEEK_R1 = r"""{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{%- if add_generation_prompt and not ns.is_tool -%}{{'<｜Assistant｜><think>\n'}}{%- endif %}"""
DEEPSEEK_V31 = r"""{%- if add_generation_prompt and ns.is_last_user and not ns.is_tool -%}{{'<｜Assistant｜>'}}
  {%- if not thinking -%}{{'</think>'}}{%- else -%}{{'<think>'}}{%- endif -%}{%- endif %}"""
GLM = r"""[gMASK]<sop>{%- if loop.index0 > ns.last_user_index and reasoning_content -%}
{{ '\n<think>' + reasoning_content.strip() +  '</think>'}}{%- else -%}{{ '\n<think></think>' }}{%- endif -%}
{%- if content.strip() -%}{{ '\n' + content.strip() }}{%- endif -%}"""
QWEN3 = r"""{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}{%- endif %}"""
SMOLLM2 = r"""{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"""


@pytest.mark.parametrize(
    ("template", "name", "suffix"),
    [
        (DEEPSEEK_R1, "deepseek-r1", "\n</think>\n\nNow"),
        (DEEPSEEK_V31, "deepseek", "</think>Now"),
        (GLM, "glm", "</think>\nNow"),
        (QWEN3, "qwen3", "\n</think>\n\nNow"),
        (SMOLLM2, "plain", "\n\nNow"),
        (None, "plain", "\n\nNow"),
        ("... [THINK] ... [/THINK]", "THINK", "\n[/THINK]\n\nNow"),
    ],
)
def test_style_of_a_template(template: str | None, name: str, suffix: str) -> None:
    style = style_of(template)
    assert style.name == name
    assert fork_suffix(style, "Now") == suffix


@pytest.mark.parametrize(
    ("parser", "name"),
    [
        ("deepseek-r1", "deepseek-r1"),
        ("deepseek-v3", "deepseek"),
        ("deepseek-v4", "deepseek"),
        ("glm45", "glm"),
        ("qwen3", "qwen3"),
    ],
)
def test_style_of_the_servers_own_parser_wins_over_the_template(parser: str, name: str) -> None:
    style = style_of(SMOLLM2, parser)
    assert (style.name, style.open, style.close) == (name, "<think>", "</think>")
    assert style_of(QWEN3, parser).name == name


def test_markers_of_any_other_parser_are_sglangs() -> None:
    style = style_of(None, "gpt-oss")
    assert (style.open, style.close) == ("<|channel|>analysis<|message|>", "<|end|>")
    assert style_of(None, "qwen3-thinking").forced


def test_override_wins_and_errors_name_field_value_and_remedy() -> None:
    assert style_of(QWEN3, "qwen3", "plain") is PLAIN
    custom = style_of(None, None, "<a>...</a>")
    assert (custom.open, custom.close) == ("<a>", "</a>")
    with pytest.raises(ValueError, match=r"thinking='loud'.*use one of"):
        style_of(QWEN3, None, "loud")
    with pytest.raises(ValueError, match=r"reasoning_parser='loud'.*use one of"):
        style_of(QWEN3, "loud")


def test_plain_without_a_nudge_adds_nothing() -> None:
    assert fork_suffix(PLAIN) == ""
    assert fork_suffix(STYLES["deepseek"]) == "</think>"


@pytest.mark.parametrize(
    ("name", "prompt", "opened"),
    [
        ("deepseek", "<｜User｜>hi<｜Assistant｜><think>", True),
        ("deepseek", "<｜User｜>hi<｜Assistant｜></think>", False),
        ("deepseek-r1", "<｜User｜>hi<｜Assistant｜><think>\n", True),
        ("deepseek-r1", "<｜User｜>hi<｜Assistant｜>", True),
        ("deepseek-r1", "<｜Assistant｜><think>\n\n</think>\n\n", False),
        ("glm", "<|assistant|>", False),
        ("qwen3", "what is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("plain", "anything", True),
    ],
)
def test_whether_the_prompt_opened_the_thinking(name: str, prompt: str, opened: bool) -> None:
    assert prompt_opens_thinking(STYLES[name], prompt) is opened


def phases(machine: ReasoningPhase, pieces: list[str]) -> list[Phase]:
    state, seen = machine.start(), []
    for piece in pieces:
        state = machine.step(state, piece)
        seen.append(state.phase)
    return seen


def test_phases_of_an_output_that_opens_and_closes() -> None:
    machine = ReasoningPhase(STYLES["qwen3"], opened=False)
    assert phases(machine, ["\n", "<th", "ink>", "a </thin", "k", ">", "b", "<think>"]) == [
        Phase.BEFORE,
        Phase.BEFORE,
        Phase.THINKING,
        Phase.THINKING,
        Phase.THINKING,
        Phase.ANSWER,
        Phase.ANSWER,
        Phase.ANSWER,
    ]


def test_an_output_without_an_open_marker_is_an_answer_unless_the_prompt_opened_it() -> None:
    assert phases(ReasoningPhase(STYLES["qwen3"], opened=False), ["Hello"]) == [Phase.ANSWER]
    assert phases(ReasoningPhase(STYLES["qwen3"], opened=True), ["Hello"]) == [Phase.THINKING]
    assert phases(ReasoningPhase(PLAIN, opened=False), ["x", "</think>", "y"]) == [Phase.THINKING] * 3


@given(st.booleans(), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_any_cut_closes_at_the_same_place(opened: bool, sizes: list[int]) -> None:
    output = ("" if opened else "<think>\n") + "first < / think> </thin\nthen</think>\n\nanswer"
    machine = ReasoningPhase(STYLES["qwen3"], opened)
    state, at, turn = machine.start(), 0, 0
    while state.phase is not Phase.ANSWER:
        at, turn = at + sizes[turn % len(sizes)], turn + 1
        state = machine.step(state, output[at - sizes[(turn - 1) % len(sizes)] : at])
        assert at < len(output) + 10
    closed_at = output.index("</think>") + len("</think>")
    assert closed_at <= at < closed_at + max(sizes)
    reasoning, answer = split_thinking(STYLES["qwen3"], opened, output)
    assert (reasoning.strip(), answer) == ("first < / think> </thin\nthen", "\n\nanswer")


def test_split_of_unfinished_missing_and_plain_thinking() -> None:
    assert split_thinking(STYLES["qwen3"], True, "still going") == ("still going", None)
    assert split_thinking(STYLES["qwen3"], False, "an answer") == ("", "an answer")
    assert split_thinking(PLAIN, False, "all of it") == ("all of it", None)

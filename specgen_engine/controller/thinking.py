"""How a model marks its thinking, how a fork closes it, and whether an output is still inside it.

The markers come from the server's reasoning parser where one is set, else from the model's own chat template. A model
with neither has the style ``plain``: its whole output counts as reasoning, and a fork only gets the nudge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ThinkingStyle:
    """Markers around a model's thinking, and the blanks the model's own template puts around the closing one.

    open and close are "" for ``plain``. ``forced`` models think from their first token, with or without an open marker.
    """

    name: str
    open: str
    close: str
    before_close: str = "\n"
    after_close: str = "\n\n"
    forced: bool = False


CLOSE_MARK = "</think>"
"""Of every style that has marks."""
PLAIN = ThinkingStyle("plain", "", "", "", "\n\n")
STYLES = {
    style.name: style
    for style in (
        ThinkingStyle("deepseek-r1", "<think>", CLOSE_MARK, forced=True),
        ThinkingStyle("deepseek", "<think>", CLOSE_MARK, "", ""),
        ThinkingStyle("glm", "<think>", CLOSE_MARK, "", "\n"),
        ThinkingStyle("qwen3", "<think>", CLOSE_MARK),
        PLAIN,
    )
}
_OF_PARSER = {
    "deepseek-r1": "deepseek-r1",
    "deepseek-v3": "deepseek",
    "deepseek-v4": "deepseek",
    "glm45": "glm",
    "qwen3": "qwen3",
    "qwen3-thinking": "qwen3",
}
_OTHER_MARKERS = (
    ("<think>", CLOSE_MARK),
    ("<mm:think>", "</mm:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)


def _from_parser(name: str) -> ThinkingStyle:
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    known = ", ".join(sorted(ReasoningParser.DetectorMap))
    if name.lower() not in ReasoningParser.DetectorMap:
        raise ValueError(f"reasoning_parser={name!r}: SGLang has no such parser; use one of {known}")
    try:
        detector = ReasoningParser(model_type=name).detector
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reasoning_parser={name!r}: its markers can't be read ({error}); set a thinking style"
        ) from None
    style = STYLES.get(_OF_PARSER.get(name.lower(), ""), ThinkingStyle(name.lower(), "", ""))
    forced = style.forced or bool(detector.force_reasoning)
    return replace(style, open=detector.think_start_token, close=detector.think_end_token, forced=forced)


def _from_template(template: str) -> ThinkingStyle:
    for opened, closed in _OTHER_MARKERS:
        if closed not in template:
            continue
        if closed == "</think>" and "<｜Assistant｜>" in template:
            return STYLES["deepseek-r1" if "<think>\\n" in template or "<think>\n" in template else "deepseek"]
        if closed == "</think>" and "[gMASK]" in template:
            return STYLES["glm"]
        if closed == "</think>" and "<|im_start|>" in template:
            return STYLES["qwen3"]
        return ThinkingStyle(opened.strip("<>[]|"), opened, closed)
    return PLAIN


def style_of(
    chat_template: str | None, reasoning_parser: str | None = None, override: str | None = None
) -> ThinkingStyle:
    """The thinking style of a served model.

    override: a name of STYLES, or ``OPEN...CLOSE`` (markers joined by three dots). Raises ValueError with field, value
    and remedy on an unknown override or parser.
    """
    if override:
        if override in STYLES:
            return STYLES[override]
        opened, dots, closed = override.partition("...")
        if dots and opened and closed:
            return ThinkingStyle("custom", opened, closed)
        raise ValueError(
            f"thinking={override!r}: no such style; use one of {', '.join(STYLES)}, "
            "or both markers as <think>...</think>"
        )
    if reasoning_parser:
        return _from_parser(reasoning_parser)
    return _from_template(chat_template) if chat_template else PLAIN


def fork_suffix(style: ThinkingStyle, nudge: str = "") -> str:
    """Text that follows prompt + reasoning in a fork: closes the thinking as the model would, then the nudge.

    Without markers and without a nudge it is "": the fork merely goes on.
    """
    if not style.close:
        return f"\n\n{nudge}" if nudge else ""
    return f"{style.before_close}{style.close}{style.after_close}{nudge}"


def prompt_opens_thinking(style: ThinkingStyle, prompt: str) -> bool:
    """Whether the output starts inside the thinking: the prompt's end opened it, or the model always thinks."""
    if not style.close:
        return True
    if style.open and prompt.rstrip().endswith(style.open):
        return True
    return style.forced and not prompt.rstrip().endswith(style.close)


class Phase(StrEnum):
    BEFORE = "before"
    THINKING = "thinking"
    ANSWER = "answer"


class PhaseState(NamedTuple):
    """phase after the tokens so far; tail: text that may be the start of a marker."""

    phase: Phase
    tail: str = ""


@dataclass(frozen=True, slots=True)
class ReasoningPhase:
    """Whether an output is inside its thinking, as a pure machine over decoded tokens.

    opened: the prompt opened the thinking already (``prompt_opens_thinking``). A model that starts with anything but
    the open marker doesn't think: its output is an answer from the first token on.
    """

    style: ThinkingStyle
    opened: bool

    def start(self) -> PhaseState:
        return PhaseState(Phase.THINKING if self.opened or not self.style.close else Phase.BEFORE)

    def step(self, state: PhaseState, piece: str) -> PhaseState:
        phase, tail = state
        if phase is Phase.ANSWER or not self.style.close:
            return state
        tail += piece
        if phase is Phase.BEFORE:
            text = tail.lstrip()
            if not text.startswith(self.style.open):
                waiting = self.style.open.startswith(text)
                return PhaseState(Phase.BEFORE, tail) if waiting else PhaseState(Phase.ANSWER)
            tail = text[len(self.style.open) :]
        if self.style.close in tail:
            return PhaseState(Phase.ANSWER)
        return PhaseState(Phase.THINKING, tail[-(len(self.style.close) - 1) :])


def split_thinking(style: ThinkingStyle, opened: bool, output: str) -> tuple[str, str | None]:
    """(reasoning, answer) of a whole output; the answer is None while the thinking is not closed."""
    if not style.close:
        return output, None
    text = output.lstrip()
    if style.open and text.startswith(style.open):
        text = text[len(style.open) :]
    elif not opened:
        return "", output
    else:
        text = output
    reasoning, closed, answer = text.partition(style.close)
    return (reasoning, answer) if closed else (reasoning, None)


def without_thinking(text: str) -> str:
    """A server without a reasoning parser leaves the thinking in the text; a code fence may be open where it ends."""
    return text.rpartition(CLOSE_MARK)[2]

"""The base request as read so far: its output, whether it still reasons, and where its answer begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from specgen_engine.controller.engine import Output
from specgen_engine.controller.thinking import Phase, ReasoningPhase, ThinkingStyle, split_thinking


class BaseRequest:
    """opened: the prompt opened the thinking. encode: text to token ids. done: it has ended and needs no abort."""

    def __init__(self, style: ThinkingStyle, opened: bool, encode: Callable[[str], list[int]]) -> None:
        self.style, self.opened, self._encode = style, opened, encode
        self.output = Output([], "", {})
        self.done = False
        self._phase = ReasoningPhase(style, opened)
        self._phase_seen = 0
        self._phase_state = self._phase.start()

    def take(self, output: Output) -> dict[str, Any] | None:
        """The output after one more step; its finish reason when it was the last."""
        self.output = output
        piece = output.text[self._phase_seen :]  # in one piece: the machine takes pieces of any length
        self._phase_seen = len(output.text)
        if piece:
            self._phase_state = self._phase.step(self._phase_state, piece)
        self.done = self.done or output.finish is not None
        return output.finish

    @property
    def tokens(self) -> int:
        return len(self.output.ids)

    @property
    def has_closed_thinking(self) -> bool:
        return self._phase_state.phase is Phase.ANSWER and bool(self.style.close)

    def answer(self) -> str | None:
        """Text after its thinking; None while that is open, or where the model marks none."""
        return split_thinking(self.style, self.opened, self.output.text)[1]

    def drop_answer(self) -> Output:
        """Cut it off before the closing mark: an unstreamed answer that lost is not part of what is returned."""
        answer, text = self.answer(), self.output.text
        if answer is not None:
            kept = text[: len(text) - len(answer) - len(self.style.close)].rstrip("\n")
            dropped = len(self._encode(text[len(kept) :]))
            self.output = Output(self.output.ids[: self.tokens - dropped], kept, self.output.meta)
        return self.output

    def answer_tokens(self) -> int:
        """By re-encoding the answer's text alone."""
        answer = self.answer()
        return len(self._encode(answer)) if answer else 0

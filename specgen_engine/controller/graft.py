"""The last output of a search that ended early: reasoning so far, the closing mark, the accepted answer."""

from __future__ import annotations

from typing import Any

from specgen_engine.controller.engine import Output
from specgen_engine.controller.thinking import ThinkingStyle, fork_suffix


def graft(reasoning: Output, answer: Output, close_ids: list[int], style: ThinkingStyle) -> Output:
    """text and ids that read as if the base had closed its thinking here and answered itself.

    reasoning: the base's output with its thinking still open. The usage counts the tokens of the text returned, fork
    tokens apart; finish_reason is a plain stop.
    """
    ids = [*reasoning.ids, *close_ids, *answer.ids]
    meta: dict[str, Any] = {
        **reasoning.meta,
        "finish_reason": {"type": "stop", "matched": None},
        "completion_tokens": len(ids),
    }
    return Output(ids, reasoning.text + fork_suffix(style) + answer.text, meta)

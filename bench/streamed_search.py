"""The streamed chat request of a search, as bench.engine_starved and bench.overhead send it."""

from __future__ import annotations

import json
from typing import Any


def streamed_search(task: str, number: int, trigger: str, fork_tokens: int, tokens: int) -> dict[str, Any]:
    """A body for /v1/chat/completions: a base of so many tokens, of which nothing but its length ends it."""
    wanted = {"task": task, "trigger": trigger, "termination": "none", "fork": {"max_tokens": fork_tokens}}
    return {
        "model": "m", "messages": [{"role": "user", "content": f"search {number}"}],
        "stream": True, "temperature": 0, "max_tokens": tokens, "ignore_eos": True,
        "custom_params": {"specgen": json.dumps(wanted)},
    }  # fmt: skip

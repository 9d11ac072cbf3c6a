"""Tools that work inside the candidate's process: in its sandbox, on the inputs that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import cupti, torch_profiler
from .base import ProfileError, Tool


def profile_call(tool: str, call: Callable[[], Any], device: str) -> dict[str, Any]:
    """The message with the median call's kernels (launches.parse_call reads it), or with the error of the tool.

    What the candidate raises goes through.
    """
    measure = cupti.profile_call if tool == Tool.CUPTI else torch_profiler.profile_call
    try:
        return measure(call, device)
    except ProfileError as error:
        return {"event": "profiled", "error": str(error)}

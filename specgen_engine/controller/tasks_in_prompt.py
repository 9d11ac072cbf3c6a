"""Finding the task of a request in its prompt: an unchanged agent needs no field of ours."""

from __future__ import annotations

from specgen_engine.controller.answers import PYTHON_LANGUAGES, fenced_blocks, module_names

TASK_NAMES = frozenset({"Model", "get_inputs", "get_init_inputs"})


def find_task(prompt_text: str) -> str | None:
    """Source of the last fenced module that defines Model, get_inputs and get_init_inputs, or None.

    The last one, because prompts in KernelBench form show a worked example before the task itself.
    """
    for block in reversed(fenced_blocks(prompt_text)):
        if block.closed and block.language in PYTHON_LANGUAGES and (module_names(block.source) or set()) >= TASK_NAMES:
            return block.source
    return None

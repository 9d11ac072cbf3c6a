"""The task of an unchanged agent's prompt is the last fenced reference module."""

from __future__ import annotations

import pytest

from specgen_engine.controller.tasks_in_prompt import find_task

TASK = "class Model: ...\ndef get_inputs(): return []\ndef get_init_inputs(): return []\n"
EXAMPLE = TASK.replace("[]", "[1]")


def test_the_task_follows_the_worked_example() -> None:
    example = f"Example:\n```python\n{EXAMPLE}```\nBecomes:\n```python\nclass ModelNew: ...\n```\n"
    prompt = f"{example}You are given:\n```\n{TASK}```\nGo."
    assert find_task(prompt) == TASK


def test_a_last_attempt_in_the_prompt_is_not_the_task() -> None:
    assert (
        find_task(f"~~~py\n{TASK}~~~\nYour last:\n```python\nclass ModelNew: ...\ndef get_inputs(): ...\n```") == TASK
    )


@pytest.mark.parametrize("missing", ["Model", "get_inputs", "get_init_inputs"])
def test_every_name_is_needed(missing: str) -> None:
    assert find_task(f"```python\n{TASK.replace(f' {missing}', ' other', 1)}```") is None


@pytest.mark.parametrize(
    "prompt", ["", TASK, f"```python\n{TASK}", f"```cpp\n{TASK}```", "```python\nclass Model(\n```"]
)
def test_no_task(prompt: str) -> None:
    assert find_task(prompt) is None

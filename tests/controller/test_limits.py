"""Limits of a request and of what may reach a server: one value on either side of each, and the field that is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.config import SpecGenConfig
from specgen_engine.controller.request import TASK_CHARS, RequestOptions, parse_options, plan_search
from specgen_engine.controller.trust import is_loopback, prompt_tasks_refused
from specgen_engine.errors import RequestError

TASK = "class Model: ...\ndef get_inputs(): return []\ndef get_init_inputs(): return []\n"


@pytest.mark.parametrize(
    ("allowed", "refused", "field"),
    [
        ({"fork": {"nudge": "n" * 10_000}}, {"fork": {"nudge": "n" * 10_001}}, "fork.nudge"),
        ({"fork": {"temperature": 0}}, {"fork": {"temperature": -0.1}}, "fork.temperature"),
        ({"fork": {}}, {"fork": {"temprature": 1}}, "fork.temprature"),
        ({"task": "\n" * TASK_CHARS}, {"task": "\n" * (TASK_CHARS + 1)}, "task"),
        ({"name": "n" * 200}, {"name": "n" * 201}, "name"),
    ],
    ids=["nudge", "temperature", "unknown fork field", "task", "name"],
)
def test_a_value_at_its_limit_is_taken_and_one_beyond_names_its_field(
    allowed: dict[str, Any], refused: dict[str, Any], field: str
) -> None:
    assert isinstance(parse_options(allowed), RequestOptions)
    with pytest.raises(RequestError) as error:
        parse_options(refused)
    assert error.value.field == field
    assert len(str(error.value)) < 400


def test_json_too_deep_to_read_is_one_error() -> None:
    with pytest.raises(RequestError, match="not JSON"):
        parse_options("[" * 200_000)


def test_a_root_that_is_a_link_allows_what_lies_in_its_folder(tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    (folder / "t.py").write_text(TASK)
    link.symlink_to(folder)
    config = SpecGenConfig.model_validate({"tasks": {"roots": [str(link)]}})
    plan = plan_search(RequestOptions(task=str(link / "t.py")), "", config)
    assert plan is not None
    assert plan.task.source == TASK


def test_loopback_is_told_however_it_is_written() -> None:
    assert is_loopback("[::1]")
    assert is_loopback("LOCALHOST")
    assert not is_loopback("[::]")
    assert not is_loopback("localhost.example.org")


def test_an_admin_key_alone_leaves_prompts_untrusted() -> None:
    server = SimpleNamespace(host="0.0.0.0", api_key=None, admin_api_key="admin")
    assert "--api-key" in prompt_tasks_refused(SpecGenConfig(), server)

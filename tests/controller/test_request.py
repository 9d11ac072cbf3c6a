"""custom_params.specgen: taken out before tokenisation, validated, every error naming its field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.config import SpecGenConfig
from specgen_engine.controller.request import RequestOptions, parse_options, plan_search, take_out
from specgen_engine.controller.trust import prompt_tasks_refused
from specgen_engine.errors import RequestError

TASK = "class Model: ...\ndef get_inputs(): return []\ndef get_init_inputs(): return []\n"
PROMPT = f"Make it fast.\n\n```python\n{TASK}```\n"


def test_take_out_leaves_the_other_params() -> None:
    params = {"custom_params": {"specgen": {"task": "x"}, "other": 1}}
    assert take_out(params) == {"task": "x"}
    assert params == {"custom_params": {"other": 1}}
    assert take_out({"custom_params": None}) is None
    assert take_out({}) is None


@pytest.mark.parametrize("value", [{"task": TASK}, json.dumps({"task": TASK})])
def test_an_object_and_its_json_string_are_the_same(value: Any) -> None:
    options = parse_options(value)
    assert isinstance(options, RequestOptions)
    assert options.task == TASK


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"taks": TASK}, "specgen.taks: Extra inputs"),
        ({"termination": "speedup:-1"}, "specgen.termination:"),
        ({"trigger": "every:0"}, "specgen.trigger:"),
        ({"fork": {"max_tokens": 0}}, "specgen.fork.max_tokens:"),
        ({"fork": {"temperature": 9}}, "specgen.fork.temperature:"),
        ({"fork": {"end_repeats": -1}}, "specgen.fork.end_repeats:"),
        ({"iteration": 0}, "specgen.iteration:"),
        ("{not json", "not JSON"),
        (3, "got 3"),
        ([1], "got [1]"),
    ],
)
def test_a_bad_value_names_its_field(value: Any, says: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_options(value)
    assert says in str(error.value)


def test_false_opts_out_and_none_is_not_named() -> None:
    assert parse_options(False) is False
    assert parse_options("false") is False
    assert parse_options(None) is None


def test_a_task_is_taken_from_the_prompt_only_where_allowed_or_named() -> None:
    explicit, prompt = SpecGenConfig(), SpecGenConfig.model_validate({"tasks": {"source": "prompt"}})
    assert plan_search(None, PROMPT, explicit) is None
    plan = plan_search(None, PROMPT, prompt)
    assert plan is not None
    assert (plan.task.source.strip(), plan.named, plan.end_repeats) == (TASK.strip(), False, None)
    named = plan_search(RequestOptions(), PROMPT, explicit)
    assert named is not None
    assert named.named
    with pytest.raises(RequestError, match=r"specgen\.task: missing"):
        plan_search(RequestOptions(), "hello", prompt)


def test_the_request_narrows_the_configuration() -> None:
    config = SpecGenConfig.model_validate({"fork": {"max_tokens": 100, "nudge": "A"}})
    options = RequestOptions.model_validate(
        {
            "task": TASK,
            "trigger": "fence",
            "termination": "correct",
            "fork": {"max_tokens": 500, "nudge": "", "end_repeats": 0},
        }
    )
    plan = plan_search(options, "", config)
    assert plan is not None
    assert (plan.trigger, plan.termination, plan.fork_tokens, plan.nudge) == ("fence", "correct", 100, "")
    assert plan.end_repeats == 0.0


@pytest.mark.parametrize(
    ("server", "asked", "worth"),
    [
        (3.0, {}, 3.0),
        (3.0, {"end_repeats": 0}, 0.0),
        (3.0, {"end_repeats": None}, None),
        (None, {}, None),
        (None, {"end_repeats": 10}, 10.0),
    ],
)
def test_ending_repeats_is_the_servers_unless_the_request_says_otherwise(
    server: float | None, asked: dict[str, Any], worth: float | None
) -> None:
    config = SpecGenConfig.model_validate({"fork": {"end_repeats": server}})
    plan = plan_search(RequestOptions.model_validate({"task": TASK, "fork": asked}), "", config)
    assert plan is not None
    assert plan.end_repeats == worth


def test_a_task_path_must_be_under_an_allowed_root(tmp_path: Path) -> None:
    root = tmp_path / "tasks"
    root.mkdir()
    (root / "t.py").write_text(TASK)
    (tmp_path / "secret.py").write_text("secret")
    allowed = SpecGenConfig.model_validate({"tasks": {"roots": [str(root)]}})
    plan = plan_search(RequestOptions(task=str(root / "t.py")), "", allowed)
    assert plan is not None
    assert plan.task.source == TASK
    for path in (tmp_path / "secret.py", root / ".." / "secret.py"):
        with pytest.raises(RequestError, match="outside the folders"):
            plan_search(RequestOptions(task=str(path)), "", allowed)
    with pytest.raises(RequestError, match="the server allows none"):
        plan_search(RequestOptions(task="/etc/passwd"), "", SpecGenConfig())


def test_a_link_out_of_a_root_a_pipe_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "tasks"
    root.mkdir()
    (tmp_path / "secret.py").write_text(TASK)
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    os.mkfifo(root / "pipe.py")
    (root / "huge.py").write_bytes(b" " * ((1 << 20) + 1))
    (root / "bytes.py").write_bytes(b"\xff\xfe")
    allowed = SpecGenConfig.model_validate({"tasks": {"roots": [str(root)]}})
    for name, says in (
        ("link.py", "outside the folders"),
        ("pipe.py", "cannot be read"),
        ("huge.py", "cannot be read"),
        ("bytes.py", "cannot be read"),
        ("none.py", "cannot be read"),
        (".", "cannot be read"),
    ):
        with pytest.raises(RequestError, match=rf"specgen\.task: .*{says}"):
            plan_search(RequestOptions(task=str(root / name)), "", allowed)


def test_a_server_that_anyone_reaches_takes_no_task_from_a_prompt() -> None:
    config = SpecGenConfig.model_validate({"tasks": {"source": "prompt"}})
    open_server = SimpleNamespace(host="0.0.0.0", api_key=None)
    refused = prompt_tasks_refused(config, open_server)
    assert "--specgen-allow-untrusted" in refused
    assert plan_search(None, PROMPT, config, refused) is None
    with pytest.raises(RequestError, match=r"specgen\.task: missing, and .*--api-key"):
        plan_search(RequestOptions(), PROMPT, config, refused)
    assert plan_search(RequestOptions(task=TASK), PROMPT, config, refused) is not None


@pytest.mark.parametrize(
    ("host", "key", "allow", "is_refused"),
    [
        ("127.0.0.1", None, False, False), ("localhost", None, False, False), ("::1", None, False, False),
        ("127.8.8.8", None, False, False), (None, None, False, False), ("0.0.0.0", None, False, True),
        ("::", None, False, True), ("10.0.0.4", None, False, True), ("node7", None, False, True),
        ("", None, False, True), ("0.0.0.0", "key", False, False), ("0.0.0.0", None, True, False),
    ],
)  # fmt: skip
def test_which_servers_take_tasks_from_prompts(
    host: str | None, key: str | None, allow: bool, is_refused: bool
) -> None:
    config = SpecGenConfig(allow_untrusted=allow)
    assert bool(prompt_tasks_refused(config, SimpleNamespace(host=host, api_key=key))) is is_refused

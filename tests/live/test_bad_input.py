"""Every bad value is one 400 that names its field, streamed or not, and the server goes on: no 5xx, nobody dead."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from specgen_engine.errors import SpecGenError
from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import running_server
from tests.controller.test_fuzz import nearly
from tests.live.conftest import ADMIN, ENVIRONMENT, KEY, SEARCH, Live
from tests.live.recording import TASK, write_trace

HUGE = TASK.replace("torch.randn(256, 256)", "torch.empty(1 << 42)")
GROWING = TASK.replace("return [torch.randn(256, 256)]", "return [torch.ones(1 << 28) for _ in range(64)]")
BAD = [
    ({"taks": TASK}, "specgen.taks"),
    ({"task": "import nowhere_at_all\n" + TASK}, "specgen.task"),
    ({"task": TASK.replace("class Model(", "class Other(")}, "specgen.task"),
    ({"task": TASK.replace("def get_inputs(", "def inputs(")}, "specgen.task"),
    ({"task": HUGE}, "specgen.task"),
    ({"task": GROWING}, "specgen.task"),
    ({"task": "import os\nos._exit(3)\n" + TASK}, "specgen.task"),
    ({**SEARCH, "termination": "speedup:0"}, "specgen.termination"),
    ({**SEARCH, "termination": "best_of:1000000000"}, "specgen.termination"),
    ({**SEARCH, "trigger": "every:-4"}, "specgen.trigger"),
    ({**SEARCH, "fork": {"temperature": 3}}, "specgen.fork.temperature"),
    ({**SEARCH, "iteration": 9}, "specgen.iteration"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("value", "says"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_400_names_the_field(live: Live, value: dict[str, Any], says: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        for _ in live.chat(json.dumps(value), stream=stream):
            pass
    assert says in str(error.value)
    assert live.still_runs()


def test_a_task_that_never_ends_is_a_400_within_its_limit(live: Live) -> None:
    started = time.monotonic()
    with pytest.raises(openai.BadRequestError, match=r"specgen\.task: .*more than 15 s"):
        live.chat({"task": "while True:\n    pass\n" + TASK})
    assert time.monotonic() - started < 60
    assert live.still_runs()


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        (
            'trigger = "every:400"\n[fork]\nper_search = "many"\n',
            r"toml:3: fork.per_search: Input should be",
        ),
        ("history = true\n", r"specgen.toml:1: history: Input should be a valid integer"),
        ('replay = ["{trace}"]\n', r"specgen.toml:1: replay: .*fork-2.md"),
    ],
    ids=["text", "boolean", "cut trace"],
)
def test_a_bad_configuration_stops_the_start(template: Template, tmp_path: Path, toml: str, says: str) -> None:
    trace = write_trace(tmp_path / "rows", "")
    (trace / "iter-1" / "fork-2.md").write_bytes(b"```python\nimport torch\n\xe2\x82")
    file = tmp_path / "specgen.toml"
    file.write_text(toml.format(trace=trace))
    launch = prepare(["--tiny", "--specgen-config", str(file)])
    server = running_server(
        launch.arguments, tmp_path / "log", {**launch.environment, **ENVIRONMENT}, timeout_s=60, template=template
    )
    with pytest.raises(SpecGenError, match=rf"ended before it was up: specgen: --specgen-config .*{says}"), server:
        pass


@settings(
    max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(value=nearly)
def test_fuzzed_values_over_http(live: Live, value: Any) -> None:
    body = {
        "model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1,
        "custom_params": {"specgen": {**value, "trigger": value.get("trigger", "none"), "termination": "none"}},
    }  # fmt: skip
    answer = httpx.post(
        f"{live.server.url}/v1/chat/completions",
        content=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        timeout=120,
    )
    assert answer.status_code < 500, answer.text
    assert answer.status_code in (200, 400), answer.text


def test_described_requests_over_http(live: Live) -> None:
    schema = schemathesis.openapi.from_dict(live.get("/specgen/openapi.json", KEY).json())
    seen: set[int] = set()

    def ask(case: schemathesis.Case) -> None:
        if case.path == "/specgen/events":
            case.query = {**(case.query or {}), "follow": "false"}
        key = KEY if "{search}" in case.path or "json" in case.path else ADMIN
        answer = case.call(base_url=live.server.url, headers={"Authorization": f"Bearer {key}"})
        seen.add(answer.status_code)
        assert answer.status_code < 500, answer.text

    for operation in schema.get_all_operations():
        check = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))(
            given(case=operation.ok().as_strategy())(lambda case: ask(case))
        )
        check()
    assert {200, 404} <= seen
    assert live.still_runs()

"""2,000 values of custom_params.specgen: each is a search, is left alone, or is one error that names its field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specgen_engine.config import SpecGenConfig
from specgen_engine.controller.request import Plan, parse_options, plan_search, take_out
from specgen_engine.errors import RequestError

TASK = "class Model: ...\ndef get_inputs(): return []\ndef get_init_inputs(): return []\n"
FIELDS = ("task", "name", "trigger", "termination", "fork", "iteration")

odd = st.sampled_from(["", "\x00", "\ud800", "\n", "a" * 5000, "/", ".."])
texts = st.text() | st.text(alphabet=st.characters(categories=["Cs", "Lu", "Nd", "Po"])) | odd
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400) | st.just(-(10**30))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
specs = st.sampled_from(["every", "paragraph", "speedup", "plateau", "best_of", "none", "correct", "fence", ""])
arguments = st.sampled_from(["1", "-1", "0", "1e999", "nan", "inf", "9" * 5000, "1.5", "٣", "", "min=3", "min="])
spelled = st.builds(lambda names, tail: "+".join(names) + ":" + tail, st.lists(specs, max_size=3), arguments)
forks = st.fixed_dictionaries({}, optional={"nudge": values, "temperature": values, "max_tokens": values, "x": values})
paths = st.sampled_from([str(Path(__file__)), "/etc/passwd", "/dev/zero", "a\x00b", "~"])
nearly = st.fixed_dictionaries(
    {},
    optional={
        "task": st.just(TASK)
        | st.sampled_from([str(Path(__file__)), "/etc/passwd", "/dev/zero", "a\x00b", "~"])
        | values,
        "name": values,
        "trigger": spelled | values,
        "termination": spelled | values,
        "fork": forks | values,
        "iteration": values,
        "unknown": values,
    },
)
anything = nearly | values | nearly.map(json.dumps) | texts | st.integers(1, 100_000).map(lambda n: "[" * n)
CONFIGS = [
    SpecGenConfig(),
    SpecGenConfig.model_validate({"tasks": {"roots": [str(Path(__file__).parent)], "source": "prompt"}}),
]


def planned(value: Any, config: SpecGenConfig) -> Plan | None:
    params = {"custom_params": {"specgen": value}}
    options = parse_options(take_out(params))
    assert "specgen" not in (params["custom_params"] or {})
    if options is False:
        return None
    assert not isinstance(options, bool)
    return plan_search(options, f"```python\n{TASK}```", config)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(anything, st.sampled_from(CONFIGS))
def test_every_value_is_a_search_or_one_error_that_names_its_field(value: Any, config: SpecGenConfig) -> None:
    plan, refused = None, None
    try:
        plan = planned(value, config)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert str(refused).startswith("custom_params.specgen")
        str(refused).encode()
        assert len(str(refused)) < 1000
        if isinstance(value, dict) and refused.field and refused.field.isascii():
            assert refused.field.startswith(tuple(name[:100] for name in (*FIELDS, *value)))
    elif plan is not None:
        assert plan.task.hash
        json.dumps([plan.task.name, plan.trigger, plan.termination, plan.nudge], ensure_ascii=False).encode()
        assert 1 <= plan.fork_tokens <= config.fork.max_tokens
        assert plan.temperature is None or 0 <= plan.temperature <= 2


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"task": "a\n\ud800"}, "specgen.task: "),
        ({"task": TASK, "name": "\udfff"}, "specgen.name: "),
        ({"task": "\n" * (1 << 21)}, "specgen.task: "),
        ({"task": TASK, "fork": {"temperature": float("nan")}}, "specgen.fork.temperature: "),
        ({"task": "a\x00b"}, "specgen.task: "),
        ("[" * 200_000, "specgen: not JSON"),
    ],
    ids=["surrogate", "name", "long", "nan", "nul", "deep"],
)
def test_what_the_fuzzer_found_stays_found(value: Any, says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        planned(value, CONFIGS[1])

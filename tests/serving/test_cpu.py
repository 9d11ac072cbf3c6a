from __future__ import annotations

import os

import pytest

from specgen_engine.serving.cpu import DEFAULTS, STUB, cpu_arguments, cpu_environment, has_option, option_value


def test_adds_what_is_missing() -> None:
    arguments = cpu_arguments(["--model-path", "m"])
    assert arguments[:2] == ["--model-path", "m"]
    assert all(has_option(arguments, name) for name, _ in DEFAULTS)
    assert option_value(arguments, "--device") == "cpu"


@pytest.mark.parametrize("given", [["--dtype", "bfloat16"], ["--dtype=bfloat16"]])
def test_keeps_what_the_user_gave(given: list[str]) -> None:
    arguments = cpu_arguments(given)
    assert sum(word.partition("=")[0] == "--dtype" for word in arguments) == 1
    assert option_value(arguments, "--dtype") == "bfloat16"


def test_is_idempotent() -> None:
    assert cpu_arguments(cpu_arguments([])) == cpu_arguments([])


def test_last_value_wins_and_absence_is_none() -> None:
    assert option_value(["--port", "1", "--port=2"], "--port") == "2"
    assert option_value(["--portal", "1"], "--port") is None
    assert not has_option(["--portal=1"], "--port")


def test_environment_is_a_copy_with_the_stub_first() -> None:
    given = {"PYTHONPATH": os.pathsep.join(["a", str(STUB)]), "HOME": "h"}
    environment = cpu_environment(given)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(STUB), "a"]
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert environment["HOME"] == "h"
    assert given["PYTHONPATH"].startswith("a")


def test_triton_is_interpreted_for_paged_allocation_only() -> None:
    assert "TRITON_INTERPRET" not in cpu_environment({})
    assert cpu_environment({}, page_size=16)["TRITON_INTERPRET"] == "1"


def test_other_model_files_are_switched_off() -> None:
    off = cpu_environment({}, model_module="llama")["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert "llama" not in off
    assert "qwen3" in off
    assert len(off) > 100


def test_bad_values_name_themselves() -> None:
    with pytest.raises(ValueError, match="page_size: 0"):
        cpu_environment({}, page_size=0)
    with pytest.raises(ValueError, match=r"model_module: SGLang has no models/lama\.py"):
        cpu_environment({}, model_module="lama")


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2, 5})
    assert cpu_environment({}, tp_size=2)["SGLANG_CPU_OMP_THREADS_BIND"] == "0,2|1,5"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert cpu_environment({}, tp_size=2)["SGLANG_CPU_OMP_THREADS_BIND"] == "3|3"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in cpu_environment({})

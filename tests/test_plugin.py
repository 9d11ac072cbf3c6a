"""The hook table fits this SGLang; what does not is one error that names the version; no flag, no hooks."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from specgen_engine import plugin
from specgen_engine.arguments import check_schedulers
from specgen_engine.errors import HookError
from specgen_engine.serving.command import prepare

START = """
import json
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args
prepare_server_args({arguments!r})
print(json.dumps(sorted(HookRegistry._patched)))
"""

FORKS = """
import json, os, sys
import sglang.srt.plugins, sglang.srt.server_args
codes = {}
for name, code in json.loads(sys.argv[2]).items():
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        exec(code)
        sys.exit(0)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def hooks(process: str) -> set[str]:
    return {hook.target for hook in plugin.HOOKS if hook.process == process}


def program(*arguments: str) -> str:
    """Reads its arguments as launch_server does, and prints the targets that are hooked then."""
    words = [word for word in prepare(["--tiny"]).arguments if word != "--enable-specgen"]
    return START.format(arguments=[*words, *arguments])


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = prepare(["--tiny"]).environment
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=240, env=environment
    )


Started = dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """One with the flag from an interpreter of its own, beside it three that share one import of SGLang, of 20 s."""
    folder = tmp_path_factory.mktemp("started")
    programs = {
        "without": program(),
        "settings": program("--specgen-trigger", "fence"),
        "refused": program("--enable-specgen", "--disable-radix-cache"),
    }
    with ThreadPoolExecutor(2) as threads:
        forks = threads.submit(run, FORKS, str(folder), json.dumps(programs))
        with_it = threads.submit(run, program("--enable-specgen"))
        codes = json.loads(forks.result().stdout)
    outputs = {name: [(folder / f"{name}.{stream}").read_text() for stream in (1, 2)] for name in programs}
    done = {name: subprocess.CompletedProcess([], codes[name], *outputs[name]) for name in programs}
    return {**done, "with it": with_it.result()}


def active_after(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("specgen: ")]
    return line


def test_every_hook_fits_this_sglang() -> None:
    assert [row for row in plugin.check_hooks() if row["problem"]] == []


def test_every_handler_exists_and_every_hook_says_why() -> None:
    for hook in plugin.HOOKS:
        module, _, name = hook.handler.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert hook.purpose


@pytest.fixture
def registry() -> Iterator[None]:
    from sglang.srt.plugins.hook_registry import HookRegistry

    saved = dict(HookRegistry._hooks), set(HookRegistry._patched)
    yield
    HookRegistry._hooks.clear()
    HookRegistry._hooks.update(saved[0])
    HookRegistry._patched = saved[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expects": ("self", "batch")}, r"takes \(self, batch, result\), expected \(self, batch\)"),
        ({"target": "sglang.srt.managers.scheduler.Scheduler.no_such_method"}, "is missing"),
    ],
)
def test_a_hook_that_does_not_fit_names_the_version(
    monkeypatch: pytest.MonkeyPatch, registry: None, change: dict[str, object], says: str
) -> None:
    hook = next(h for h in plugin.HOOKS if h.target.endswith("process_batch_result"))
    monkeypatch.setattr(plugin, "HOOKS", (dataclasses.replace(hook, **change),))  # type: ignore[arg-type]
    with pytest.raises(HookError, match=says) as error:
        plugin.activate("scheduler")
    assert f"SGLang {plugin.sglang_version()}" in str(error.value)


def test_a_scheduler_without_a_hook_stops_start_up() -> None:
    complete = {"specgen": {"hooks": sorted(hooks("scheduler"))}}
    check_schedulers([complete, complete])
    partial = {"specgen": {"hooks": sorted(hooks("scheduler"))[1:]}}
    with pytest.raises(RuntimeError, match="rank 1 runs without the hooks on"):
        check_schedulers([complete, partial])
    with pytest.raises(RuntimeError, match="rank 0"):
        check_schedulers([{}])


def test_a_stray_variable_does_not_activate_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.ACTIVE, "999999999")
    assert not plugin._inside_active_server()
    monkeypatch.setenv(plugin.ACTIVE, "yes")
    assert not plugin._inside_active_server()


def test_without_the_flag_only_the_argument_hooks_are_active_and_with_it_all(started: Started) -> None:
    assert active_after(started["without"]) == hooks("arguments")
    assert active_after(started["with it"]) == {hook.target for hook in plugin.HOOKS}


def test_settings_without_the_flag_and_refused_modes_stop_start_up(started: Started) -> None:
    assert "--specgen-trigger needs --enable-specgen" in refusal(started["settings"])
    assert "--disable-radix-cache: fork points live" in refusal(started["refused"])

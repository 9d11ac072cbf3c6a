"""Configuration: a wrong value stops with its key, line and remedy; an absent one is the default."""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from specgen_engine import config
from specgen_engine.errors import ConfigError
from specgen_engine.replay.trace import BUNDLED


def parse(*words: str) -> config.SpecGenConfig:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.from_arguments(parser.parse_args(["--enable-specgen", *words]))


def test_absent_means_default_and_the_default_is_a_plateau() -> None:
    settings = parse()
    assert settings == config.SpecGenConfig()
    assert settings.termination == "gain:0.3"
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_file_and_flags_merge_and_the_flag_wins(tmp_path: Path) -> None:
    file = tmp_path / "specgen.toml"
    file.write_text('trigger = "paragraph"\n[fork]\nper_search = 7\nmax_tokens = 99\n')
    settings = parse("--specgen-config", str(file), "--specgen-fork-per-search", "3", "--specgen-tasks", "prompt")
    assert (settings.trigger, settings.fork.per_search, settings.fork.max_tokens) == ("paragraph", 3, 99)
    assert settings.tasks.source == "prompt"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[fork]\nper_search = 'many'\n", ":2: fork.per_search: Input should be a valid integer"),
        ("[fork]\n\nmax_tokens = 0\n", ":3: fork.max_tokens: Input should be greater than or equal to 1"),
        ("spork = 1\n", ":1: spork: Extra inputs are not permitted"),
        ('\ntermination = "speedup:fast"\n', ":2: termination:"),
        ("[evaluation]\nworkers = 2\nsandbox = 'maybe'\n", ":3: evaluation.sandbox:"),
        ("fork = 3\n", ":1: fork:"),
        ('history = "12"\n', ":1: history: Input should be a valid integer"),
        ("[evaluation]\nworkers = true\n", ":2: evaluation.workers: Input should be a valid integer"),
        ('[fork]\nnudge = ""\ntemperature = "0.5"\n', ":3: fork.temperature: Input should be a valid number"),
        ('allow_untrusted = "yes"\n', ":1: allow_untrusted: Input should be a valid boolean"),
        ("trigger = 1979-05-27\nreplay = 'x'\n", ":2: replay: Input should be a valid"),
        ("[tasks]\nroots = ['/nowhere/at/all']\n", ":2: tasks.roots: /nowhere/at/all is no folder"),
        ('[evaluation]\ndevice = "gpu0"\n', ":2: evaluation.device:"),
        ("[scheduler]\nheadroom = 1.0\n", ":2: scheduler.headroom: Input should be less than 1"),
        ("trigger = \n", "not TOML"),
    ],
)
def test_a_bad_file_names_key_and_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "specgen.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse("--specgen-config", str(file))
    assert says in str(error.value)
    assert str(file) in str(error.value)


def test_a_bad_flag_names_the_flag_and_the_value() -> None:
    with pytest.raises(ConfigError, match=r"--specgen-fork-total: .*'zero'"):
        parse("--specgen-fork-total", "zero")


def test_a_switch_is_on_when_named_and_off_otherwise() -> None:
    assert parse("--specgen-allow-untrusted").allow_untrusted is True
    assert parse().allow_untrusted is False


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda trace: shutil.rmtree(trace), "no such folder"),
        (lambda trace: (trace / "task.py").unlink(), "task.py"),
        (lambda trace: (trace / "iter-1" / "final.md").unlink(), "final.md"),
        (lambda trace: (trace / "iter-1" / "fork-3.md").unlink(), "fork-3.md"),
        (lambda trace: (trace / "iter-1" / "fork-3.md").write_bytes(b"```python\n\xe2\x82"), "fork-3.md"),
        (lambda trace: (trace / "iter-1" / "measured.json").write_text('{"final": '), "measured.json"),
        (lambda trace: (trace / "iter-1" / "reasoning.md").write_text(""), "reasoning.md"),
    ],
    ids=["folder", "task", "final", "answer", "cut answer", "cut measurements", "empty reasoning"],
)
def test_a_trace_with_a_missing_or_cut_file_is_refused_at_start_naming_it(
    tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    trace = tmp_path / "trace"
    shutil.copytree(BUNDLED / "cpu_row_softmax", trace)
    assert parse("--specgen-replay", str(trace)).replay == (trace,)
    damage(trace)
    with pytest.raises(ConfigError, match=rf"^--specgen-replay: .*{re.escape(says)}"):
        parse("--specgen-replay", str(trace))


def test_a_file_that_is_missing_or_no_text_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b'trigger = "\xff"')
    for name in ("none.toml", "bytes.toml"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            parse("--specgen-config", str(tmp_path / name))


def test_every_leaf_has_a_flag_and_a_description() -> None:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    text = parser.format_help()
    for path, info in config.leaves():
        assert config.flag_of(path) in text
        assert info.description, path

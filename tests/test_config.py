"""Configuration: a wrong value stops with its key, line and remedy; an absent one is the default."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest

from specgen_engine import config
from specgen_engine.errors import ConfigError


def parse(*words: str) -> config.SpecGenConfig:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.from_arguments(parser.parse_args(["--enable-specgen", *words]))


def test_absent_means_default_and_the_default_is_a_plateau() -> None:
    settings = parse()
    assert settings == config.SpecGenConfig()
    assert settings.termination == "plateau:3"
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


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse("--specgen-config", str(tmp_path / "none.toml"))


def test_every_leaf_has_a_flag_and_a_description() -> None:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    text = parser.format_help()
    for path, info in config.leaves():
        assert config.flag_of(path) in text
        assert info.description, path

"""Configuration: a wrong value stops with its key, line and remedy; an absent one is the default."""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine import arguments, config, plugin, versions
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


# ---- every flag: values at its limits, and those that stop the start

COUNT = ("1",), ("0", "1.5", "many", "")
SECONDS = ("0.001",), ("0", "-1", "inf", "nan", "soon")
SHARE = ("1", "0.001"), ("0", "1.001", "nan", "half")
LIMITS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trigger": (("every:1" + " " * 493,), ("every:0", "sometimes", "every:1" + " " * 494)),
    "termination": (("correct" + " " * 493,), ("speedup:0", "soon", "correct" + " " * 494)),
    "thinking": (("<a>..." + "b" * 494,), ("nonsense", "<a>..." + "b" * 495)),
    "grace-s": (("0",), ("-0.001", "inf", "nan", "soon")),
    "fork-temperature": (("0", "2"), ("-0.001", "2.001", "nan", "warm")),
    "fork-end-repeats": (("0", "1000000"), ("-0.001", "1000001", "nan", "some")),
    "evaluation-pause": (("0", "0.999"), ("-0.001", "1", "nan", "often")),
    "fork-max-tokens": COUNT,
    "fork-per-search": COUNT,
    "fork-total": COUNT,
    "scheduler-batch-share": SHARE,
    "scheduler-base-share": SHARE,
    "scheduler-headroom": (("0", "0.999"), ("-0.001", "1", "nan", "some")),
    "evaluation-workers": COUNT,
    "evaluation-device": (("cuda", "cuda:1,cuda:2", "ray:host:1"), ("gpu0", "cuda:1,", "cuda:x", "ray:host", "")),
    "evaluation-compile-s": SECONDS,
    "evaluation-check-s": SECONDS,
    "evaluation-time-s": SECONDS,
    "evaluation-task-s": SECONDS,
    "evaluation-memory-gb": SECONDS,
    "sandbox": (("auto", "require", "off"), ("maybe", "")),
    "evaluation-profile": (("auto", "ncu"), ("yes", "")),
    "tasks": (("explicit", "prompt"), ("both", "")),
    "tasks-roots": ((".",), ("/nowhere/at/all", __file__)),
    "kv": (("peer", "loopback", "host", "off"), ("disk", "")),
    "kv-fallback": (("refuse", "host", "off"), ("on", "")),
    "kv-chunk-mib": COUNT,
    "kv-max-chunks": (("1", "4096"), ("0", "4097", "all")),
    "kv-sms": (("1", "132"), ("0", "133", "all")),
    "replay": ((str(BUNDLED / "cpu_row_softmax"),), ("/nowhere/at/all",)),
    "history": COUNT,
}
ANY_TEXT = {"fork-nudge", "evaluation-cache", "kv-directory", "adaptive-state"}
SWITCHES = {"fork-feedback", "allow-untrusted"}


def test_the_limits_below_are_those_of_every_flag() -> None:
    flags = {config.flag_of(path).removeprefix("--specgen-") for path, _ in config.leaves()}
    assert flags == LIMITS.keys() | ANY_TEXT | SWITCHES


def test_the_page_lists_every_setting() -> None:
    page = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    assert config.markdown_table() in page, "put config.markdown_table() into docs/settings.md"


@pytest.mark.parametrize("flag", LIMITS)
def test_a_flag_takes_its_limits_and_names_itself_and_the_value_beyond_them(flag: str) -> None:
    allowed, refused = LIMITS[flag]
    (path,) = (path for path, _ in config.leaves() if config.flag_of(path) == f"--specgen-{flag}")
    for value in allowed:
        read_back: Any = parse(f"--specgen-{flag}", value)
        for name in path:
            read_back = getattr(read_back, name)
        single = read_back[0] if isinstance(read_back, tuple) else read_back
        assert single == type(single)(value)
    for value in refused:
        with pytest.raises(ConfigError) as error:
            parse(f"--specgen-{flag}", value)
        assert str(error.value).startswith(f"--specgen-{flag}: ")
        assert value.strip()[:100] in str(error.value)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("flag", sorted(LIMITS.keys() | ANY_TEXT | SWITCHES | {"config"}))
def test_a_flag_without_the_plugins_is_refused_by_its_name(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = [] if flag in SWITCHES else ["x"]
    with pytest.raises(SystemExit) as ended:
        read(f"--specgen-{flag}", *value)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"specgen: --specgen-{flag} needs --enable-specgen\n"


def read(*words: str, **server: Any) -> Any:
    """The server's arguments as our hook returns them, around a SGLang that takes any."""
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    page = {"page_size": 1, "speculative_algorithm": None, **server}
    return arguments.from_cli_args(lambda cls, args: SimpleNamespace(**page), object, parser.parse_args(words))


def test_without_any_flag_sglangs_arguments_are_returned_as_they_are() -> None:
    assert read() == SimpleNamespace(page_size=1, speculative_algorithm=None)


def test_what_is_wrong_with_the_settings_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("activate", "mark_active"):
        monkeypatch.setattr(plugin, name, lambda *_: pytest.fail("a hook was set although the start is refused"))
    for words, server, says in (
        (["--specgen-fork-total", "zero"], {}, "--specgen-fork-total: Input should be a valid integer"),
        ([], {"page_size": 3}, "--enable-specgen does not go with --page-size: untested; use 1, 16, 32 or 64"),
        ([], {"page_size": 3, "pp_size": 2}, "use --tp-size; --page-size: "),
    ):
        with pytest.raises(SystemExit) as ended:
            read("--enable-specgen", *words, **server)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("specgen: ")
        assert says in said
        assert said.count("\n") == 1


def test_settings_reach_the_servers_arguments_and_the_hooks_of_both_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(plugin, "activate", called.append)
    monkeypatch.setattr(plugin, "mark_active", lambda: called.append("marked"))
    settings = vars(read("--enable-specgen", "--specgen-history", "3"))["specgen"]
    assert settings == config.SpecGenConfig(history=3)
    assert called == ["server", "scheduler", "marked"]


def test_a_release_that_is_not_tested_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "sglang_version", lambda: "0.6.99")
    with pytest.raises(SystemExit):
        read("--enable-specgen", "--specgen-history", "none")
    assert "SGLang 0.6.99 is none of the releases" in capsys.readouterr().err


def test_the_tier_is_refused_on_a_release_that_it_is_not_built_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "current", lambda: versions.release_of("0.5.23"))
    with pytest.raises(SystemExit):
        read("--enable-specgen", "--specgen-kv", "host")
    said = capsys.readouterr().err
    assert said.startswith("specgen: --specgen-kv host: SGLang 0.5.23 has no HiRadixCache")
    assert said.strip().endswith("use off, or SGLang 0.5.17")

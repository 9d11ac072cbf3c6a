"""The template process without SGLang's weight: what it forks, passes on and refuses."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from specgen_engine.errors import SpecGenError
from specgen_engine.serving import preload

FAKE = """
import os, sys
from specgen_engine.serving import preload
preload._import_all = lambda: print("imported", flush=True)
def launch(arguments):
    print("launched", arguments, os.environ["MARK"], os.getsid(0) == os.getpid(), flush=True)
    if arguments == ["fail"]:
        raise RuntimeError("no such model")
    __import__("time").sleep(60)
preload._launch = launch
import socket
control = socket.socket(fileno=int(sys.argv[-1]))
preload._import_all()
preload._serve_orders(control, lambda arguments: print("expects", arguments, flush=True))
"""


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    popen = preload.subprocess.Popen

    def fake(command: list[str], **options: object):
        return popen([sys.executable, "-c", FAKE, command[-1]], **options)

    monkeypatch.setattr(preload.subprocess, "Popen", fake)
    environment = {"PYTHONPATH": ":".join(sys.path)}
    with preload.Template(environment, tmp_path / "template.log") as running:
        yield running, environment


def wait_for(log: Path, text: str) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if log.exists() and text in log.read_text():
            return log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{text!r} not in {log.read_text() if log.exists() else 'no log'}")


def test_forks_servers_of_their_own_session_environment_and_log(template, tmp_path: Path) -> None:
    running, environment = template
    pids = []
    for name in ("a", "b"):
        pids.append(running.start(["--port", name], {**environment, "MARK": name}, tmp_path / name))
        assert f"launched ['--port', '{name}'] {name} True" in wait_for(tmp_path / name, "launched")
    assert len(set(pids)) == 2
    said = (tmp_path / "template.log").read_text().splitlines()
    assert said == ["imported", "expects ['--port', 'a']", "expects ['--port', 'b']"]
    for pid in pids:
        psutil.Process(pid).kill()


def test_failed_launch_ends_with_its_error_in_the_log(template, tmp_path: Path) -> None:
    running, environment = template
    pid = running.start(["fail"], {**environment, "MARK": ""}, tmp_path / "log")
    wait_for(tmp_path / "log", "RuntimeError: no such model")
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


def test_refuses_an_environment_that_was_read_at_import(template, tmp_path: Path) -> None:
    running, environment = template
    with pytest.raises(SpecGenError, match="TRITON_INTERPRET: '1' here, None when SGLang was imported"):
        running.start([], {**environment, "TRITON_INTERPRET": "1"}, tmp_path / "log")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    """What SGLang's get_tokenizer was asked for; two modules have its name."""
    asked = []

    def get_tokenizer(name: str, **options: object) -> object:
        asked.append((name, options))
        if name == "nowhere":
            raise OSError(name)
        return object()

    for module in ("sglang.srt.utils.hf_transformers_utils", "a_user_of_it"):
        fake = types.ModuleType(module)
        fake.get_tokenizer = get_tokenizer
        monkeypatch.setitem(sys.modules, module, fake)
    return asked


ASKED = {"tokenizer_mode": "auto", "trust_remote_code": False, "revision": None, "tokenizer_backend": "huggingface"}


def test_a_tokenizer_is_read_once_for_every_process_that_asks_for_the_same(reads) -> None:
    tokenizers = preload.Tokenizers()
    ask = sys.modules["a_user_of_it"].get_tokenizer
    tokenizers.expect(["--model-path", "a", "--port", "1"])
    tokenizers.expect(["--model-path=a"])
    assert reads == [("a", ASKED)]
    assert ask("a", **ASKED) is ask("a", **ASKED)
    assert len(reads) == 1
    assert ask("a", **{**ASKED, "tokenizer_mode": "slow"}) is not ask("a", **ASKED)
    assert ask("b", **ASKED) is not ask("a", **ASKED)
    assert [name for name, _ in reads] == ["a", "a", "b"]


def test_a_tokenizer_of_its_own_is_the_one_expected_and_one_that_cannot_be_read_is_the_server_s_error(reads) -> None:
    tokenizers = preload.Tokenizers()
    tokenizers.expect(["--model-path", "a", "--tokenizer-path", "nowhere"])
    tokenizers.expect(["--help"])
    assert [name for name, _ in reads] == ["nowhere"]
    with pytest.raises(OSError, match="nowhere"):
        sys.modules["a_user_of_it"].get_tokenizer("nowhere", **ASKED)


def test_dead_template_is_one_error(template, tmp_path: Path) -> None:
    running, environment = template
    running._process.kill()
    running._process.wait()
    with pytest.raises(SpecGenError, match="template process"):
        running.start([], environment, tmp_path / "log")

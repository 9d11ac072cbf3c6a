"""What commands write: refused before any work where it can't be, and no scratch file is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specgen_engine import doctor as doctor_module
from specgen_engine.cli import app
from specgen_engine.errors import SpecGenError
from specgen_engine.evaluation import command as evaluation
from specgen_engine.evaluation.tasks.flashinfer import append_traces
from specgen_engine.files import require_writable, write_whole
from specgen_engine.observability.machine import write_report
from specgen_engine.replay import command as replay_module

BUNDLED = Path(replay_module.__file__).parent / "bundled" / "cpu_row_softmax"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file takes what is written, and has no room for it when it is flushed."""
    real = os.fdopen

    def fdopen(handle: int, *arguments: Any, **named: Any) -> Any:
        os.close(handle)
        return real(os.open("/dev/full", os.O_WRONLY), *arguments, **named)

    monkeypatch.setattr(os, "fdopen", fdopen)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (".", "is a folder; name a file"),
        ("absent/r.json", "its folder does not exist; make it first"),
        ("pipe", "is no regular file"),
        ("file/r.json", "its folder does not exist"),
        ("a" * 300, f"{os.strerror(errno.ENAMETOOLONG)}; name a file that can be written"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str, says: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecGenError, match=f"^--json {tmp_path}.*{says}"):
        require_writable(tmp_path / place, "--json")
    require_writable(tmp_path / "new.json", "--json")
    require_writable(tmp_path / "file", "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_whole(path, "text"),
        lambda path: write_report(path, {"a": 1}),
        lambda path: append_traces(path, []),
    ],
    ids=["whole", "report", "traces"],
)
def test_a_full_disk_leaves_the_old_file_alone_and_nothing_else(tmp_path: Path, full_disk: None, write: Any) -> None:
    path = tmp_path / "r.json"
    path.write_text("old\n")
    with pytest.raises(SpecGenError, match=r"r\.json: not written: No space left on device"):
        write(path)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", [".", "absent/r.json"])
@pytest.mark.parametrize("command", ["evaluate", "replay", "doctor"])
def test_commands_refuse_it_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    for module, work in ((evaluation, "load_task"), (replay_module, "replay_server"), (doctor_module, "collect")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("work was begun"))
    given = {"evaluate": ["task.py", "candidate.py"], "replay": [str(BUNDLED)], "doctor": []}[command]
    result = CliRunner().invoke(app, [command, *given, "--json", str(tmp_path / place)])
    assert isinstance(result.exception, SpecGenError)
    assert f"--json {tmp_path / place}: " in str(result.exception)
    assert list(tmp_path.iterdir()) == []

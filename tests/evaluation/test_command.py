"""`specgen evaluate` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import TASK, module


def _specgen(*arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    code = "from specgen_engine.cli import main; main()"
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "SPECGEN_CACHE": str(cache), "HOME": str(cache)}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", code, "evaluate", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env=environment, cwd=root,
    )  # fmt: skip


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.py"
    path.write_text(TASK.source)
    return path


def test_verdicts_of_files_and_answers(task: Path, tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(module())
    (tmp_path / "answer.md").write_text(f"Zero is faster.\n\n```python\n{module('return x * 0')}\n```\n")
    report_path = tmp_path / "report.json"
    done = _specgen(task, tmp_path / "good.py", tmp_path / "answer.md", "--json", report_path, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert report["schema"] == "specgen.verdicts/1"
    assert [row["status"] for row in report["verdicts"]] == ["correct", "wrong"]
    assert report["verdicts"][0]["interval"][0] <= report["verdicts"][0]["speedup"]
    assert set(report["verdicts"][0]["stages"]) == {"queued", "compile", "check", "time"}
    assert "good.py" in done.stderr
    assert not list(tmp_path.glob(".report*"))


BAD = {
    "binary": (b"\x7fELF\xff\0", "binary bytes"),
    "ten megabytes": (b"#" * (10 << 20), "at most 1048576"),
    "no module.md": (b"no code here", "no fenced module"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(task: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BAD[name][0])
    done = _specgen(task, path, "--json", tmp_path / "report.json", cache=tmp_path)
    _one_line(done, BAD[name][1])
    assert not (tmp_path / "report.json").exists()


def test_bad_arguments_are_one_line(task: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.py"
    good.write_text(module())
    _one_line(_specgen(task, tmp_path / "absent.py", cache=tmp_path), "absent.py")
    _one_line(_specgen(task, good, "--device", "cuda:99", cache=tmp_path), "cuda:99")
    _one_line(_specgen(task, good, "--json", tmp_path / "no" / "r.json", cache=tmp_path), "folder does not exist")
    _one_line(_specgen(good, good, cache=tmp_path), "defines no Model")


def _one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]

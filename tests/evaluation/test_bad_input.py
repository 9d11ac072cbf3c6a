"""`specgen evaluate` on bad input: one clear line, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from specgen_engine.evaluation import command
from specgen_engine.evaluation.command import BadInput

from .conftest import TASK, module

FORMATS = Path(__file__).parent / "formats"
ROOT = Path(__file__).resolve().parents[2]
SOLUTION = FORMATS / "flashinfer/solutions/torch_fused.json"


def specgen(folder: Path, *arguments: object, path: str = os.environ["PATH"], **more: str) -> str:
    """The one line that `specgen evaluate` prints; everything it may write goes to folder/tmp and folder/cache."""
    scratch, cache = folder / "tmp", folder / "cache"
    scratch.mkdir(exist_ok=True)
    report = folder / "report.json"
    environment = {"PATH": path, "HOME": str(folder), "TMPDIR": str(scratch), "SPECGEN_CACHE": str(cache), **more}
    done = subprocess.run(
        [sys.executable, "-m", "specgen_engine", "evaluate", *map(str, arguments), "--json", str(report)],
        capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    assert not report.exists()
    assert list(scratch.iterdir()) == []
    assert list(cache.rglob("*.so")) == []
    assert _workers_in(scratch) == []
    return lines[0]


def _workers_in(scratch: Path) -> list[int]:
    """Workers of this command, by the scratch folder in their command line."""
    lines = {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, line in lines.items() if str(scratch) in line]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.py"
    path.write_text(module())
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task_module.py"
    path.write_text(TASK.source)
    return path


def test_a_task_without_model(tmp_path: Path, good: Path) -> None:
    assert "the task defines no Model" in specgen(tmp_path, good, good)


def test_inputs_that_do_not_fit(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "huge.py"
    path.write_text(TASK.source.replace("torch.randn(256, 512)", "torch.randn(1 << 22, 1 << 12)"))
    line = specgen(tmp_path, path, good)
    assert "task huge: its inputs and results don't fit the memory of cpu" in line


def test_ten_megabytes(tmp_path: Path, task: Path) -> None:
    path = tmp_path / "big.py"
    path.write_bytes(b"#" * (10 << 20))
    assert "big.py: 10485760 bytes; at most 1048576 are read" in specgen(tmp_path, task, path)


def test_a_device_without_an_end(tmp_path: Path, task: Path, good: Path) -> None:
    assert "/dev/zero: more than 1048576 bytes" in specgen(tmp_path, task, Path("/dev/zero"))
    assert "/dev/zero: more than " in specgen(tmp_path, Path("/dev/zero"), good)


def test_binary_bytes(tmp_path: Path, task: Path) -> None:
    path = tmp_path / "binary.cu"
    path.write_bytes(b"\x7fELF\xff\0")
    assert "binary.cu: binary bytes, not a text (byte 4)" in specgen(tmp_path, task, path)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a machine with a GPU")
def test_no_gpu(tmp_path: Path, task: Path, good: Path) -> None:
    assert "--device cuda:0: this machine has 0 GPUs" in specgen(tmp_path, task, good, "--device", "cuda:0")


def test_no_nvcc(tmp_path: Path, task: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: nvcc is a package of this environment, which no PATH hides."""
    path = FORMATS / "candidates" / "scaled_softmax.cu"
    monkeypatch.setattr(command, "find_nvcc", lambda: None)
    with pytest.raises(
        BadInput, match=r"scaled_softmax.cu: a candidate of form cuda needs nvcc.*pip install"
    ) as caught:
        command.evaluate(task, [good, path], json=tmp_path / "report.json")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.json").exists()


def test_no_ncu(tmp_path: Path, task: Path, good: Path) -> None:
    places = [Path("/usr/local/cuda/bin/ncu"), Path("/opt/nvidia/nsight-compute")]
    if any(place.exists() for place in places):
        pytest.skip("ncu is installed")
    empty = tmp_path / "no-programs"
    empty.mkdir()
    line = specgen(tmp_path, task, good, "--profile", "--profile-tool", "ncu", path=str(empty))
    assert "--profile-tool ncu: ncu: not installed" in line


def test_no_permission_for_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = tmp_path / "params"
    parameters.write_text("EnableMSI: 1\nRmProfilingAdminOnly: 1\n")
    monkeypatch.setattr("specgen_engine.evaluation.profile.ncu.find_ncu", lambda: "/bin/ncu")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BadInput, match=r"--profile-tool ncu: no permission .*ERR_NVGPUCTRPERM"):
        command.require_profiler("ncu", parameters)
    parameters.write_text("RmProfilingAdminOnly: 0\n")
    command.require_profiler("ncu", parameters)
    command.require_profiler("auto", parameters)
    with pytest.raises(BadInput, match="--profile-tool perf: use one of"):
        command.require_profiler("perf", parameters)


def test_a_solution_for_another_task(tmp_path: Path, task: Path) -> None:
    assert "needs a FlashInfer Trace task" in specgen(tmp_path, task, SOLUTION)
    other = tmp_path / "other.json"
    other.write_text(SOLUTION.read_text().replace("gathered_rmsnorm_h256", "gemm"))
    assert "a solution of 'gemm'" in specgen(tmp_path, FORMATS / "flashinfer", other)


def test_traces_of_a_task_that_has_none(tmp_path: Path, task: Path, good: Path) -> None:
    assert "is no FlashInfer Trace task" in specgen(tmp_path, task, good, "--traces", tmp_path / "t.jsonl")
    assert "its folder does not exist" in specgen(tmp_path, task, good, "--traces", tmp_path / "no" / "t.jsonl")

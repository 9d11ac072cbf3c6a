"""Profiles through a pool on a CPU: torch.profiler as it is, and a stand-in for ncu that prints what ncu documents."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from specgen_engine.evaluation.base import Candidate, Stage, Status, Verdict
from specgen_engine.evaluation.profile.base import Profile
from specgen_engine.evaluation.sandbox import files_level

from .conftest import LIMITS, TASK, PoolThread, module

STAND_IN = '''#!{python}
"""Not ncu: it takes ncu's options, runs the program named after them, and writes a raw page that a test made up."""
import subprocess, sys, time
from pathlib import Path
mode = Path(__file__).with_name("mode").read_text()
if "--query-metrics" in sys.argv:
    print("sm__ops_path_tensor_src_bf16_dst_fp32  Counter  op")
    sys.exit()
log = Path(sys.argv[sys.argv.index("--log-file") + 1])
with Path(__file__).with_name("runs").open("a") as runs:
    runs.write("run ")
program = sys.argv[sys.argv.index(sys.executable) :] if sys.executable in sys.argv else sys.argv[-4:]
if mode == "hang":
    subprocess.Popen(["sleep", "987654"], start_new_session=True)
    time.sleep(600)
if mode == "dies":
    sys.exit(11)
if mode == "own files":  # as ncu's report and lock: where it likes
    log.parent.parent.with_name("report-of-its-own").write_text("here")
code = subprocess.run(program).returncode
if mode == "denied":
    log.write_text("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters\\n")
    sys.exit(1)
names = ["ID", "Kernel Name", "Block Size", "Grid Size", "gpu__time_duration.sum", "dram__bytes_read.sum",
         "dram__bytes_write.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed",
         "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread",
         "launch__shared_mem_per_block", "sm__warps_active.avg.pct_of_peak_sustained_active"]
units = ["", "", "", "", "ns", "byte", "byte", "%", "%", "register/thread", "byte/block", "%"]
row = ["0", "softmax", "(256, 1, 1)", "(256, 1, 1)", "12,000", "524288", "524288", "20.5", "88.1", "32", "1024", "77"]
table = "\\n".join(",".join(chr(34) + cell + chr(34) for cell in line) for line in (names, units, row))
log.write_text("==PROF== Connected to process 1\\n" + table + "\\n" if code == 0 else "==ERROR== it failed\\n")
'''


class Bench:
    """A pool whose workers find the stand-in; mode decides what that does."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.thread = PoolThread(folder / "builds", replace(LIMITS, profile_s=20))

    def set_mode(self, mode: str) -> None:
        (self.programs / "mode").write_text(mode)
        (self.programs / "runs").write_text("")

    def submit(self, source: str, tool: str) -> Verdict:
        async def run() -> Verdict:
            options = {"profile": tool}
            return await self.thread.pool.submit(TASK, Candidate(source), search="test", options=options).verdict()

        return self.thread.call(run())

    def left(self) -> list[str]:
        """Folders of profilers and processes below this one that look like theirs."""
        (worker,) = self.thread.pool.local.workers.values()
        lines = [" ".join(child.cmdline()) for child in _descendants()]
        return [line for line in lines if "987654" in line or "driver" in line] + [
            path.name for path in worker.scratch.glob("profile-*")
        ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("profile")
    (folder / "bin").mkdir()
    program = folder / "bin" / "ncu"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        made = Bench(folder)
    yield made
    made.thread.close()


def profile_in(verdict: Verdict) -> Profile:
    assert verdict.status is Status.CORRECT, verdict
    assert verdict.profile is not None
    plain = {name: value for name, value in verdict.profile.items() if name != "text"}
    return Profile.from_dict(plain)


def test_a_cpu_candidate_is_profiled_by_torch_in_its_sandbox(bench: Bench) -> None:
    verdict = bench.submit(module(), "auto")
    found = profile_in(verdict)
    assert found.tool == "torch.profiler"
    assert found.sandbox == verdict.sandbox
    assert found.reason == ""
    names = [kernel.name for kernel in found.kernels]
    assert "aten::_softmax" in names
    assert found.limits
    assert Stage.PROFILE in verdict.stages
    assert verdict.profile is not None
    assert 3 <= len(verdict.profile["text"].splitlines()) <= 15


def test_nobody_who_does_not_ask_pays_for_a_profile(bench: Bench) -> None:
    verdict = bench.submit(module(), "")
    assert verdict.profile is None
    assert Stage.PROFILE not in verdict.stages
    wrong = bench.submit(module("return x"), "auto")
    assert (wrong.status, wrong.profile) == (Status.WRONG, None)


def test_ncu_runs_the_candidate_in_a_process_of_its_own_and_its_figures_are_kept(bench: Bench) -> None:
    bench.set_mode("works")
    found = profile_in(bench.submit(module(), "ncu"))
    assert found.tool == "ncu", found.reason
    assert found.bound == "memory"
    assert found.kernels[0].name == "softmax"
    assert found.kernels[0].occupancy == 0.77
    assert "MemoryWorkloadAnalysis" in found.sections
    assert found.sandbox in ("landlock (files)", "process")
    assert bench.left() == []


REACHES_OUT = """
import os
found = []
if 'PYTHONDONTWRITEBYTECODE' in os.environ:
    folder = os.path.dirname(os.environ['TMPDIR'])
    for path in ('/etc/shadow', '/var/tmp/specgen-profile', folder + '/log', folder + '/confined'):
        try:
            open(path, 'r' if path == '/etc/shadow' else 'w')
            found.append(path)
        except OSError:
            pass
    assert not found, f'reached {found}'
"""


def test_under_a_tool_the_candidate_is_confined_and_the_tool_is_not(bench: Bench) -> None:
    if files_level() != "landlock (files)":
        pytest.skip("no Landlock here")
    bench.set_mode("own files")
    found = profile_in(bench.submit(module(top=REACHES_OUT), "ncu"))
    assert found.tool == "ncu", found.reason
    assert found.sandbox == "landlock (files)"


def test_a_candidate_that_makes_its_tool_fail_does_not_come_to_run_unconfined(bench: Bench) -> None:
    bench.set_mode("works")
    ends = "import os\nif 'PYTHONDONTWRITEBYTECODE' in os.environ:\n    os._exit(3)"
    found = profile_in(bench.submit(module(top=ends), "ncu"))
    assert found.tool == "torch.profiler"
    assert (bench.programs / "runs").read_text().count("run") == (1 if files_level() != "process" else 2)


def test_a_candidate_that_fails_under_the_tool_is_profiled_by_the_next_one(bench: Bench) -> None:
    """It behaves well in its own process: an environment that only the tool's process has makes it fail."""
    bench.set_mode("works")
    fragile = module("import os\nassert 'PYTHONDONTWRITEBYTECODE' not in os.environ, 'spotted'\n"
                     "return torch.softmax(x, -1) * self.weight")  # fmt: skip
    found = profile_in(bench.submit(fragile, "ncu"))
    assert found.tool == "torch.profiler"
    assert "spotted" in found.reason
    assert bench.left() == []


@pytest.mark.parametrize(("mode", "said"), [("denied", "ERR_NVGPUCTRPERM"), ("dies", "ended without figures")])
def test_a_tool_that_gives_nothing_is_one_line_and_the_next_tool_runs(bench: Bench, mode: str, said: str) -> None:
    bench.set_mode(mode)
    found = profile_in(bench.submit(module(), "ncu"))
    assert found.tool == "torch.profiler"
    assert said in found.reason
    assert "\n" not in found.reason
    assert bench.left() == []


def test_a_tool_that_is_not_installed_or_not_known_is_said(bench: Bench) -> None:
    found = profile_in(bench.submit(module(), "nsys"))
    assert found.tool == "torch.profiler"
    assert "nsys: not installed" in found.reason
    unknown = profile_in(bench.submit(module(), "perf"))
    assert unknown.tool == "none"
    assert "use one of auto, ncu" in unknown.reason


def test_a_tool_that_hangs_is_cancelled_at_once_with_everything_it_started(bench: Bench) -> None:
    """The verdict was known by then: it stays."""
    bench.set_mode("hang")

    async def run() -> tuple[Verdict, float]:
        job = bench.thread.pool.submit(TASK, Candidate(module()), search="test", options={"profile": "ncu"})
        while not any(  # noqa: ASYNC110
            "987654" in " ".join(one.cmdline()) for one in _descendants()
        ):
            await asyncio.sleep(0.05)  # another process's doing: there is nothing to await
        began = time.monotonic()
        job.cancel()
        return await job.verdict(), time.monotonic() - began

    verdict, seconds = bench.thread.call(run())
    assert seconds < 1.0  # 0.2 s on an idle machine
    assert verdict.status in (Status.CORRECT, Status.CANCELLED)
    assert bench.left() == []
    bench.set_mode("works")
    assert profile_in(bench.submit(module(), "ncu")).tool == "ncu"


def _descendants() -> list[Any]:
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            found += [one] if one.cmdline() else []
        except psutil.Error:
            continue
    return found


def test_a_tool_that_hangs_ends_at_the_stage_limit(bench: Bench, tmp_path: Path) -> None:
    bench.set_mode("hang")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{bench.programs}:{os.environ['PATH']}")
        short = Bench.__new__(Bench)
        short.programs = bench.programs
        short.thread = PoolThread(tmp_path, replace(LIMITS, profile_s=8))
    try:
        verdict = short.submit(module(), "ncu")
        assert "took more than 8 s" in profile_in(verdict).reason
        assert verdict.stages[Stage.PROFILE] < 16
        assert short.left() == []
    finally:
        short.thread.close()


def test_a_candidate_is_profiled_by_a_job_of_its_own_behind_its_verdict(bench: Bench) -> None:
    """As a search asks for it by evaluation.profile."""
    verdict, profiled = bench.thread.call(_one_after_the_other(bench))
    assert (verdict.status, verdict.profile) == (Status.CORRECT, None)
    assert profile_in(profiled).tool == "torch.profiler"


async def _one_after_the_other(bench: Bench) -> tuple[Verdict, Verdict]:
    pool, candidate, options = bench.thread.pool, Candidate(module()), {"profile": "torch.profiler"}
    verdict = await pool.submit(TASK, candidate, search="test").verdict()
    profiling = pool.submit(TASK, candidate, search="test/profile", stage="profile", options=options)
    return verdict, await profiling.verdict()

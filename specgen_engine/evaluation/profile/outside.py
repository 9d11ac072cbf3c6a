"""Runs a profiler around the driver: a process tree of its own, killed with everything in it.

The profiler is the host's own software and is not confined: it writes where it likes, and Landlock around it kept CUDA
from the driver, whose /proc/self/task is another folder. The driver confines itself before it loads the candidate;
profilers inject a library, open sockets to it and read counters, so only file access and signals (sandbox.FILES).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import specgen_engine

from .. import children, sandbox
from ..children import Child
from ..tensors import REGION_BYTES
from ..wire import Channel
from ..worker import TICK_S, Worker
from . import driver
from .base import ProfileError, Tool

if TYPE_CHECKING:
    from .stage import Subjected

LOG_BYTES = 16 << 20
PRINTED = "printed"
_level_of: dict[Tool, str] = {}
"""The level that a tool gave figures in, in this worker."""


class Outside:
    """A context: a folder with the plan and the values, which the judge writes; .driver is the command to profile."""

    def __init__(self, worker: Worker, subject: Subjected, left: Callable[[], float], tool: Tool, program: str) -> None:
        self.worker, self.subject, self.left, self.tool = worker, subject, left, tool
        self.readable = (_package(), Path(program).resolve().parent)
        self.level = self._choose_level()

    def _choose_level(self) -> str:
        """Raises ProfileError where the operator allows no less than a level that no profiler works in."""
        wanted = self.worker.limits.sandbox
        if wanted == "require":
            raise ProfileError(f"{self.tool}: sandbox=require; a profiler injects code, which that level refuses")
        if wanted == "off":
            return sandbox.PROCESS
        return _level_of.get(self.tool) or sandbox.files_level(self.worker.device)

    def __enter__(self) -> Outside:
        self.folder = Path(tempfile.mkdtemp(prefix="profile-", dir=self.worker.root))
        try:
            self._write_plan()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_plan(self) -> None:
        worker, subject = self.worker, self.subject
        values = self.folder / "values"
        fd = os.open(values, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, REGION_BYTES)  # sparse
            worker.ask(subject.judge, {"op": "export", "slot": subject.slot}, (fd,))
            told = worker.reply(subject.judge, self.left(), "writing inputs for the profiler")
        except OSError as error:
            raise ProfileError(f"{self.tool}: no room for the inputs: {error.strerror}") from error
        finally:
            os.close(fd)
        (self.folder / "source.txt").write_text(subject.source)
        plan = {key: told[key] for key in ("init", "weights", "seed", "inputs")} | {
            "device": worker.device,
            "values": str(values),
            "candidate": str(self.folder / "source.txt"),
            "threads": 0 if worker.on_gpu else worker.limits.threads,
        }
        self.plan = plan
        # Only this package may be read of the folder that it lies in, and that folder not even be listed.
        (self.folder / "python").mkdir()
        (self.folder / "python" / "specgen_engine").symlink_to(_package())
        self.driver = [sys.executable, "-m", driver.__name__, str(self.folder / "plan.json")]

    def run(self, line: Callable[[Path], Sequence[str]], good: Callable[[str], bool], remember: bool = True) -> str:
        """The tool's log file, else what it printed. Raises ProfileError when it can't start or takes too long.

        line: the command, given the log file's path.  good: the log says something; a run that gives nothing because
        the driver could not confine itself is tried once without, and the level that gave figures is remembered.
        """
        log = self.folder / "log"
        while True:
            for stale in (log, self.folder / driver.REPORT, self.folder / driver.CONFINED):
                stale.unlink(missing_ok=True)
            self._write_level()
            self._run_once([str(part) for part in line(log)])
            text = _head(log) or _head(self.folder / PRINTED)
            if good(text):
                if remember:
                    _level_of[self.tool] = self.level
                return text
            # Once confined, a candidate that makes its tool fail must not come to run without.
            if self.level == sandbox.PROCESS or _head(self.folder / driver.CONFINED):
                return text
            self.level = sandbox.PROCESS

    def _write_level(self) -> None:
        """What the driver confines itself to, at this try."""
        readable = [str(path) for path in (self.folder, *self.readable)]
        paths = {"writable": [str(self.subject.build)], "readable": readable}  # and its own TMPDIR
        self.plan["confine"] = None if self.level == sandbox.PROCESS else paths
        (self.folder / "plan.json").write_text(json.dumps(self.plan))

    def complaint(self) -> str:
        """What the driver said when it failed, as an addition to a line; "" when it did not."""
        report = self._driver_report()
        line = report.get("line", "")
        return f"; the candidate failed under it: {line}"[:300] if line else ""

    def _driver_report(self) -> Mapping[str, str]:
        try:
            return json.loads((self.folder / driver.REPORT).read_text())
        except (OSError, ValueError):
            return {}

    def _run_once(self, command: list[str]) -> None:
        worker = self.worker
        child = self._fork(command)
        worker.selector.register(child.channel, 1, child)
        worker.selector.register(child.output_fd, 1, child)
        deadline = time.monotonic() + self.left()
        try:
            while not child.ended:
                worker.heed_cancel()
                if time.monotonic() > deadline:
                    raise ProfileError(f"{self.tool}: took more than {worker.limits.profile_s:g} s and was killed")
                worker.pump(TICK_S)
                self._look_after(child)
        finally:
            worker.end(child)

    def _look_after(self, child: Child) -> None:
        limits = self.worker.limits
        used, count = children.held_bytes(child.pid)
        if used > 2 * limits.memory_bytes:
            raise ProfileError(
                f"{self.tool}: candidate and profiler hold more than {2 * limits.memory_bytes >> 20} MiB"
            )
        if count > limits.processes:
            raise ProfileError(f"{self.tool}: more than {limits.processes} processes")

    def _fork(self, command: list[str]) -> Child:
        worker, build, printed = self.worker, self.subject.build, self.folder / PRINTED
        scratch = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        paths = [str(self.folder / "python"), *(path for path in sys.path if path.endswith("-packages"))]
        extra = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCH_EXTENSIONS_DIR": str(build / "torch"),
            "TRITON_CACHE_DIR": str(build / "triton"),
        }

        def entry(channel: Channel) -> None:
            os.set_inheritable(channel.fileno(), True)  # its end tells that the last process of the tool is gone
            os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), 1)
            os.execv(command[0], command)

        child = children.fork_child(
            "profiler",
            entry,
            keep=(),
            scratch=scratch,
            limits=worker.limits,
            enter_sandbox=lambda: None,
            environment=extra,
            cap_memory=False,
        )
        child.scratch = scratch
        return child


def _package() -> Path:
    return Path(specgen_engine.__file__).resolve().parent


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LOG_BYTES).decode(errors="replace")
    except OSError:
        return ""

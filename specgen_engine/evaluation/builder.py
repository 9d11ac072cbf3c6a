"""A builder: imports C++ candidates, several at once: their libraries are in the cache when workers take them.

It is a worker's process without a judge, spares or a turn on the GPU: it forks one candidate's process a build, in the
same sandbox, and ends it once the module is imported. What fails here has its verdict from here.
It talks to the pool as a worker does (pool -> builder: build, cancel; builder -> pool: ready, built, verdict).
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import subject
from .base import Candidate, Stage, Status
from .buildcache import BuildFolder
from .candidates.forms import detect_form
from .children import Child
from .limits import EvaluationLimits
from .processes import TICK_S, Ended, Link, Lost, PoolGone, Processes
from .wire import Channel

IMPORTING = "importing the module"
NICE = 10
"""Compilers step aside for launches that are timed on a GPU: on 16 cores a reference that waits for its host took twice
as long beside 12 workers and their builds (2026-11-30). Where the host's cores are what is evaluated on, they don't."""


class Build:
    """One candidate whose process is at work. child: None when the cache, or somebody else, has its build."""

    def __init__(self, builder: Builder, request: dict[str, Any]) -> None:
        self.job, self.candidate = str(request["job"]), Candidate(request["candidate"])
        self.started = float(request["arrived"])
        self.held = ExitStack()
        self.folder = self.held.enter_context(BuildFolder(builder.cache, self.candidate.hash))
        if self.folder.hit:
            free_build_locks(self.folder.path)
        mine = not (self.folder.hit or self.folder.temporary)
        self.child: Child | None = builder.start(self.candidate, self.folder.path) if mine else None
        self.fault: Ended | None = None
        """What looking after its memory found."""


class Builder(Processes):
    """Builds side by side: each is looked at whenever anything happens, and every tick."""

    def __init__(self, link: Link, device: str, limits: EvaluationLimits, cache: Path, root: Path) -> None:
        super().__init__(link, device, replace(limits, lock_clocks=False), cache, root)
        if self.gpu_state is not None:
            self.gpu_state.close()
            self.gpu_state = None
        self.builds: dict[str, Build] = {}

    def serve(self) -> None:
        """Build what the pool asks for until it goes."""
        if self.on_gpu:
            os.nice(NICE)
        try:
            self.link.send({"ready": True, "sandbox": self.level})
            while True:
                while self.link.requests:
                    build = Build(self, self.link.requests.popleft())
                    self.builds[build.job] = build
                for build in list(self.builds.values()):
                    self._look_at(build)
                self.bury_candidate()
                if not self.link.requests:
                    self.pump(TICK_S if self.builds else 5.0)
        except (PoolGone, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            for build in list(self.builds.values()):
                self._end(build, keep=False)
            for child in list(self.dying):
                self.end(child)

    def start(self, candidate: Candidate, folder: Path) -> Child:
        device, limit = self.device, self.limits.source_bytes

        def entry(channel: Channel) -> None:
            subject.main(channel, candidate, device, (), limit)

        extra = {"TORCH_EXTENSIONS_DIR": str(folder / "torch"), "TRITON_CACHE_DIR": str(folder / "triton")}
        return self.fork("candidate", entry, (), extra)

    def _look_at(self, build: Build) -> None:
        """Tell the pool when it is done or has failed."""
        self.job, self.stage = build.job, "import"
        try:
            if not self._is_done(build):
                return
            self._end(build, keep=True)
            message: dict[str, object] = {"built": True, "cached": build.child is None}
        except Ended as ended:
            self._end(build, keep=False)
            lost = isinstance(ended, Lost)  # perhaps not its fault: a worker tries
            message = {"built": False} if lost else {"verdict": self._verdict(build, ended)}
        self.link.cancelled.discard(build.job)
        self.link.send({"job": build.job, **message})

    def _is_done(self, build: Build) -> bool:
        """Raises Ended when it was cancelled or has failed."""
        self.heed_cancel()
        child, seconds = build.child, self.limits.compile_s
        if child is None:
            return True
        if build.fault is not None:
            raise build.fault
        if child.inbox:
            self._checked(child, child.inbox.popleft())
            return True
        if child.ended:
            raise self._gone(child, IMPORTING)
        if child.printed > self.limits.output_bytes:
            raise Ended(Status.RUNTIME_ERROR, f"it printed more than {self.limits.output_bytes} bytes")
        if time.monotonic() >= build.started + seconds:
            raise self._overdue(child, seconds, IMPORTING)
        return False

    def _end(self, build: Build, *, keep: bool) -> None:
        """Nothing of it runs any more; its folder is kept, or gone."""
        self._silence(build.child)
        del self.builds[build.job]
        if keep:
            build.folder.keep()
        build.held.close()

    def _verdict(self, build: Build, ended: Ended) -> dict[str, object]:
        return {
            "candidate": build.candidate.hash,
            "device": self.device,
            "sandbox": self.level,
            "form": detect_form(build.candidate.source),
            "status": ended.status,
            "reason": ended.reason,
            "digest": ended.digest,
            "stages": {Stage.COMPILE: 0.0},  # the pool has its seconds
        }

    def _others(self, child: Child) -> set[int]:
        others = (*(build.child for build in self.builds.values()), *self.dying)
        return {other.pid for other in others if other is not None and other is not child}

    def _look_after(self) -> None:
        for build in self.builds.values():
            self.candidate = build.child
            try:
                super()._look_after()
            except Ended as ended:
                build.fault = ended
        self.candidate = None


def free_build_locks(folder: Path) -> None:
    """Remove torch's own lock files from a kept build folder that is held by flock: who waited for one waited for ever.

    A folder is kept once its module is imported; what is built later, in a constructor, may be killed while it builds.
    """
    for lock in (folder / "torch").glob("*/lock"):
        lock.unlink(missing_ok=True)

"""A worker: a process with torch imported that forks judges and candidates, keeps the clock and never runs their code.

It talks to the pool over one socket of JSON lines (pool -> worker: evaluate, check_task, cancel; worker -> pool:
ready, stage, verdict, task). When that socket closes, everything below it is killed and it exits.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import children, sandbox
from .base import Candidate, Status, Task
from .children import Child
from .digest import error_digest
from .limits import EvaluationLimits
from .wire import Channel, WireError, clip

TICK_S = 0.1
CANCEL_PATIENCE_S = 0.1


class Ended(Exception):
    """An evaluation ends here, with this status."""

    def __init__(self, status: Status, reason: str, digest: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.digest = status, reason, digest


class PoolGone(Exception):
    """The pool closed its end."""


class Link:
    """The worker's end of the pool's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.requests: deque[dict[str, Any]] = deque()
        self.cancelled: set[str] = set()
        self._buffer = bytearray()

    def read(self) -> None:
        """Take what is there. Raises PoolGone at the end."""
        data = self.sock.recv(1 << 20)
        if not data:
            raise PoolGone
        self._buffer += data
        while (end := self._buffer.find(b"\n")) >= 0:
            message = json.loads(self._buffer[:end])
            del self._buffer[: end + 1]
            if message["op"] == "cancel":
                self.cancelled.add(message["job"])
            else:
                self.requests.append(message)

    def send(self, message: dict[str, object]) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")


class Worker:
    """Forks, waits with deadlines, kills; what an evaluation consists of is in evaluate.py."""

    def __init__(self, link: Link, device: str, limits: EvaluationLimits, cache: Path, root: Path) -> None:
        self.link, self.device, self.limits, self.cache = link, device, limits, cache
        self.root = root
        self.selector = selectors.DefaultSelector()
        self.selector.register(link.sock, selectors.EVENT_READ, None)
        self.judge: Child | None = None
        self.judge_key = ""
        self.candidate: Child | None = None
        self.regions: tuple[int, ...] = ()  # those on the host of the candidate that runs
        self.on_gpu = device.startswith("cuda")
        self.job = ""
        self.stage = "import"
        self.level = sandbox.level(limits.sandbox, device)

    # -- processes -------------------------------------------------------------------------------------------------

    def fork(self, kind: str, entry: Callable[[Channel], None], keep: tuple[int, ...], extra: dict[str, str]) -> Child:
        scratch = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.root))
        build = Path(extra.get("TORCH_EXTENSIONS_DIR", scratch))
        policy = sandbox.Policy(writable=(scratch, build), device=self.device, level=self.level)
        child = children.fork_child(
            kind,
            entry,
            keep=keep,
            scratch=scratch,
            limits=self.limits,
            enter_sandbox=lambda: sandbox.enter(policy),
            environment={**_threads(self.limits.threads), **extra},
            cap_memory=not self.device.startswith("cuda"),
        )
        child.scratch = scratch
        self.selector.register(child.channel, selectors.EVENT_READ, child)
        self.selector.register(child.output_fd, selectors.EVENT_READ, child)
        return child

    def end(self, child: Child | None) -> None:
        """Kill a child with everything it started, and remove its scratch folder."""
        if child is None:
            return
        spare = {other.pid for other in (self.judge, self.candidate) if other is not None and other is not child}
        left = children.kill_tree(child.pid, spare)
        if left:
            print(f"processes that don't die after SIGKILL: {left}", file=sys.stderr, flush=True)
        if not child.ended:
            self._forget(child)
        os.close(child.output_fd)
        child.channel.close()
        child.close_fds()
        shutil.rmtree(child.scratch, ignore_errors=True)
        if child is self.judge:
            self.judge, self.judge_key = None, ""
        if child is self.candidate:
            self.candidate = None

    def _forget(self, child: Child) -> None:
        child.ended = True
        for source in (child.channel, child.output_fd):
            try:
                self.selector.unregister(source)
            except KeyError:
                pass

    # -- messages --------------------------------------------------------------------------------------------------

    def ask(self, child: Child, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Send; the reply is owed. A child that is gone is noticed when its reply is awaited."""
        child.pending += 1
        try:
            child.channel.send(message, fds)
        except OSError:
            pass

    def reply(self, child: Child, seconds: float, doing: str, *, heed_cancel: bool = True) -> dict[str, Any]:
        """The next owed message. Raises Ended when it doesn't come: timeout, crash, flood, memory, cancel."""
        deadline = time.monotonic() + seconds
        while True:
            if heed_cancel:
                self.heed_cancel()
            if child.inbox:
                child.pending -= 1
                return self._checked(child, child.inbox.popleft())
            if child.ended:
                raise self._gone(child, doing)
            if time.monotonic() >= deadline:
                raise self._overdue(child, seconds, doing)
            self.pump(min(TICK_S, deadline - time.monotonic()))

    def heed_cancel(self) -> None:
        """Raises Ended when the job at hand was cancelled."""
        if self.job in self.link.cancelled:
            raise Ended(Status.CANCELLED, "cancelled")

    def pump(self, seconds: float) -> None:
        """Handle whatever happens within a tick; looks after memory and process counts when nothing does."""
        ready = self.selector.select(max(0.0, seconds))
        for key, _ in ready:
            if key.data is None:
                self.link.read()
            elif key.fileobj is key.data.channel:
                self._take(key.data)
            else:
                self._drain(key.data)
        if not ready:
            self._look_after()

    def _take(self, child: Child) -> None:
        try:
            message, fds = child.channel.recv_fds(2 if child is self.judge else 0)
            child.fds += fds
        except (WireError, OSError):
            message = {"event": "error", "kind": "rejected", "line": "forged message", "text": "forged message"}
        if message is None:
            self._forget(child)
            self._drain(child)
            child.exit_code = children.exit_code(child.pid, wait_s=0.15)
        elif len(child.inbox) <= child.pending + 1:
            child.inbox.append(message)

    def _drain(self, child: Child) -> None:
        try:
            data = os.read(child.output_fd, 1 << 16)
        except BlockingIOError:
            return
        if not data and not child.ended:
            try:
                self.selector.unregister(child.output_fd)
            except KeyError:
                pass
        child.printed += len(data)
        child.output += data[: max(0, children.OUTPUT_KEPT - len(child.output))]
        if child is self.candidate and child.printed > self.limits.output_bytes:
            raise Ended(Status.RUNTIME_ERROR, f"it printed more than {self.limits.output_bytes} bytes")

    def _look_after(self) -> None:
        child = self.candidate
        if child is None or child.ended:
            return
        used, count = children.held_bytes(child.pid)
        used = max([used, *(os.fstat(fd).st_blocks << 9 for fd in self.regions)])
        if used > self.limits.memory_bytes:
            raise Ended(Status.RUNTIME_ERROR, f"out of memory: it holds more than {self.limits.memory_bytes >> 20} MiB")
        if count > self.limits.processes:
            raise Ended(Status.RUNTIME_ERROR, f"it started more than {self.limits.processes} processes")
        code = children.exit_code(child.pid)
        if code is not None:
            self._forget(child)
            child.exit_code = code

    # -- faults ----------------------------------------------------------------------------------------------------

    def _checked(self, child: Child, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("event") != "error":
            return message
        line, text = str(message.get("line", ""))[:400], str(message.get("text", ""))
        if child is self.judge:
            self.end(child)
            raise Ended(Status.RUNTIME_ERROR, f"the task's reference failed: {line}", error_digest(text))
        raise candidate_fault(str(message.get("kind", "")), line, text, self.stage)

    def _gone(self, child: Child, doing: str) -> Ended:
        how, printed = child.how_it_ended(), clip(child.output.decode(errors="replace"), 1500)
        if child is self.judge:
            self.end(child)
            return Ended(Status.RUNTIME_ERROR, f"the task's reference failed: its process was {how}", printed)
        return Ended(Status.CRASH, f"its process {how} while {doing}", printed)

    def _overdue(self, child: Child, seconds: float, doing: str) -> Ended:
        if child is self.judge:
            self.end(child)
            return Ended(Status.RUNTIME_ERROR, f"the task's reference takes more than {seconds:g} s ({doing})")
        return Ended(Status.TIMEOUT, f"{doing} took more than {seconds:g} s")

    # -- life ------------------------------------------------------------------------------------------------------

    def judge_for(self, task: Task) -> Child:
        """The task's judge: the one at hand, or a fresh one that still owes its 'ready'."""
        if self.judge is not None and self.judge_key == task.hash and not self.judge.ended:
            while self.judge is not None and self.judge.pending:  # replies owed to a job that was cut off
                self.reply(self.judge, self.limits.task_s, "answering")
            if self.judge is not None:
                return self.judge
        self.end(self.judge)
        seed = int.from_bytes(os.urandom(6), "little")
        device = self.device

        def entry(channel: Channel) -> None:
            from . import judge

            judge.main(channel, task, device, seed)

        self.judge = self.fork("judge", entry, (), {})
        self.judge.pending = 1
        self.judge_key = task.hash
        return self.judge

    def wait(self, seconds: float) -> None:
        """Between two tries for the GPU: live on. Raises Ended when the job at hand is cancelled."""
        self.heed_cancel()
        self.pump(seconds)

    def release_judge(self) -> None:
        """The judge gives back what it holds for a candidate; one that doesn't do so soon is ended."""
        judge = self.judge
        if judge is None or judge.ended:
            return
        patience = CANCEL_PATIENCE_S if self.job in self.link.cancelled else self.limits.task_s
        try:
            self.ask(judge, {"op": "release"})
            while judge.pending:
                self.reply(judge, patience, "giving memory back", heed_cancel=False)
        except Ended:
            self.end(self.judge)

    def start_candidate(self, candidate: Candidate, regions: tuple[int, ...], build: Path) -> Child:
        device, source_bytes = self.device, self.limits.source_bytes

        def entry(channel: Channel) -> None:
            from . import subject

            subject.main(channel, candidate, device, regions, source_bytes)

        extra = {"TORCH_EXTENSIONS_DIR": str(build / "torch"), "TRITON_CACHE_DIR": str(build / "triton")}
        self.regions = regions
        self.candidate = self.fork("candidate", entry, regions, extra)
        self.candidate.pending = 1
        return self.candidate

    def serve(self) -> None:
        """Answer the pool until it goes."""
        from .evaluate import check_task, evaluate

        self.link.send({"ready": True, "sandbox": self.level})
        try:
            while True:
                while self.link.requests:
                    request = self.link.requests.popleft()
                    self.job = request["job"]
                    self.link.send(
                        evaluate(self, request) if request["op"] == "evaluate" else check_task(self, request)
                    )
                    self.link.cancelled.discard(self.job)
                    self.job = ""
                self.pump(5.0)
        except (PoolGone, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            self.end(self.candidate)
            self.end(self.judge)


def candidate_fault(kind: str, line: str, text: str, stage: str) -> Ended:
    """What an error message of a candidate's process means."""
    if kind in (Status.REJECTED, Status.COMPILE_ERROR, Status.WRONG):
        return Ended(Status(kind), line, text if kind == Status.COMPILE_ERROR else "")
    first = line.splitlines()[0] if line else "no message"
    digest = error_digest(text)
    just_in_time = "triton" in text and "CompilationError" in text
    if stage == "import" or just_in_time or "Error building extension" in text:
        return Ended(Status.COMPILE_ERROR, digest.splitlines()[0] if digest else first, digest or first)
    return Ended(Status.RUNTIME_ERROR, first, digest or first)


def _threads(count: int) -> dict[str, str]:
    return {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} | {
        "MAX_JOBS": "2"
    }

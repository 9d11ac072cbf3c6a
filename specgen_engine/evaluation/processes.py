"""The processes below a worker: forking them, hearing them with deadlines, ending them with everything they started."""

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
from .base import Candidate, Status
from .buildcache import PreparedFolder
from .builds import lean
from .children import Child
from .digest import error_digest, is_compile_error
from .gpuroom import last_shortage
from .gpustate import GpuState
from .guards import Guard
from .limits import EvaluationLimits
from .wire import Channel, WireError, clip

TICK_S = 0.1
DYING_S = 5.0


class Ended(Exception):
    """An evaluation ends here, with this status."""

    def __init__(self, status: Status, reason: str, digest: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.digest = status, reason, digest


class Lost(Ended):
    """Somebody who is not this worker killed the process that was to answer: the host, short of memory, for one.

    A judge's end is nobody's fault. A candidate may have killed itself, so it is tried again once and no more.
    """


class PoolGone(Exception):
    """The pool closed its end."""


class Link:
    """The worker's end of the pool's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.requests: deque[dict[str, Any]] = deque()
        self.cancelled: set[str] = set()
        self.quiet: dict[str, bool] = {}  # the pool's answer to a job that asked for it
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
            elif message["op"] == "quiet":
                self.quiet[message["job"]] = bool(message["reached"])
            else:
                self.requests.append(message | {"arrived": time.monotonic()})

    def send(self, message: dict[str, object]) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")


class Processes:
    """A worker's children and its talk with them: forks, waits with deadlines, kills."""

    def __init__(self, link: Link, device: str, limits: EvaluationLimits, cache: Path, root: Path) -> None:
        self.link, self.device, self.limits, self.cache = link, device, limits, cache
        self.root, self.compilers = root, lean.environment()
        self.selector = selectors.DefaultSelector()
        self.selector.register(link.sock, selectors.EVENT_READ, None)
        self.judge: Child | None = None
        self.judge_key = ""
        self.judge_placed = False
        self.parked: dict[str, tuple[Child, bool]] = {}  # judges of former tasks, the latest last; is it placed?
        self.candidate: Child | None = None
        self.spare: Child | None = None
        self.spare_build: PreparedFolder | None = None
        self.spare_judge: Child | None = None
        self.dying: list[Child] = []
        self.regions: tuple[int, ...] = ()  # those on the host of the candidate that runs
        self.on_gpu = device.startswith("cuda")
        self.roomy = not self.on_gpu  # has the device memory for parked judges?
        self.short_at = last_shortage(device) if self.on_gpu else 0
        self.too_much = sys.maxsize  # bytes that the device did not have even after all were asked for memory
        self.gpu_fault = ""
        self.triton_base: Path | None = None
        self.gpu_state = GpuState(device, limits.lock_clocks) if self.on_gpu else None
        self.job = ""
        self.stage = "import"
        self.guards_off: frozenset[Guard] = frozenset()
        self.level = sandbox.level(limits.sandbox, device)

    # -- processes -------------------------------------------------------------------------------------------------

    def fork(self, kind: str, entry: Callable[[Channel], None], keep: tuple[int, ...], extra: dict[str, str]) -> Child:
        scratch = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.root))
        build = Path(extra.get("TORCH_EXTENSIONS_DIR", scratch / "torch")).parent
        open_to_all = kind == "candidate" and Guard.SANDBOX in self.guards_off
        level = sandbox.PROCESS if open_to_all else self.level
        readable = (lean.FOLDER, *((self.triton_base,) if self.triton_base is not None else ()))
        policy = sandbox.Policy(writable=(scratch, build), device=self.device, level=level, readable=readable)
        child = children.fork_child(
            kind,
            entry,
            keep=keep,
            scratch=scratch,
            limits=self.limits,
            enter_sandbox=lambda: sandbox.enter(policy),
            environment={**_threads(self.limits.threads), **self.compilers, **extra},
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
        self._disown(child)
        left = children.kill_tree(child.pid, self._others(child))
        if left:
            print(f"processes that don't die after SIGKILL: {left}", file=sys.stderr, flush=True)
        self._discard(child)

    def silence_candidate(self) -> None:
        """Nothing of the candidate runs any more; bury_candidate() waits until it is gone, GPU memory and all."""
        self._silence(self.candidate)

    def _silence(self, child: Child | None, patience_s: float = DYING_S) -> None:
        if child is not None:
            children.silence(child.pid, self._others(child), patience_s)
            self._disown(child)
            self._forget(child)
            self.dying.append(child)

    def bury_candidate(self) -> None:
        """Wait for the end of what was silenced; the pool is heard meanwhile."""
        while self.dying:
            self._bury(self.dying[-1])

    def _bury(self, child: Child) -> None:
        deadline = time.monotonic() + DYING_S
        while (left := children.kill_tree(child.pid, self._others(child), patience_s=0)) and (
            time.monotonic() < deadline
        ):
            self.pump(0.003)
        if left:
            print(f"processes that don't die after SIGKILL: {left}", file=sys.stderr, flush=True)
        self.dying.remove(child)
        self._discard(child)

    def _others(self, child: Child) -> set[int]:
        """The roots of the process trees that live on when a child is ended."""
        parked = (judge for judge, _ in self.parked.values())
        known = (self.judge, self.candidate, self.spare, self.spare_judge, *self.dying, *parked)
        pids = {other.pid for other in known if other is not None and other is not child}
        return pids | ({self.gpu_state.process.pid} if self.gpu_state else set())

    def _disown(self, child: Child) -> None:
        if child is self.judge:
            self.judge, self.judge_key, self.judge_placed = None, "", False
        if child is self.candidate:
            self.candidate = None
        if child is self.spare:
            self.spare = None
        if child is self.spare_judge:
            self.spare_judge = None
        self.parked = {key: kept for key, kept in self.parked.items() if kept[0] is not child}

    def _discard(self, child: Child) -> None:
        if not child.ended:
            self._forget(child)
        os.close(child.output_fd)
        child.channel.close()
        child.close_fds()
        shutil.rmtree(child.scratch, ignore_errors=True)

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

    def reply(
        self, child: Child, seconds: float, doing: str, *, heed_cancel: bool = True, unless: Child | None = None
    ) -> dict[str, Any]:
        """The next owed message; {} when `unless` has something to say, or ended, before.

        Raises Ended when it doesn't come: timeout, crash, flood, memory, cancel.
        """
        deadline = time.monotonic() + seconds
        while True:
            if heed_cancel:
                self.heed_cancel()
            if child.inbox:
                child.pending -= 1
                return self._checked(child, child.inbox.popleft())
            if child.ended:
                raise self._gone(child, doing)
            if unless is not None and (unless.inbox or unless.ended):
                return {}
            if time.monotonic() >= deadline:
                raise self._overdue(child, seconds, doing)
            self.pump(min(TICK_S, deadline - time.monotonic()))

    def end_of(self, child: Child, doing: str) -> Ended | None:
        """How a child ended that answered before; None when it lives."""
        self.pump(0.0)
        return self._gone(child, doing) if child.ended else None

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
                self._answer_cancelled()
            elif key.fileobj is key.data.channel:
                self._take(key.data)
            else:
                self._drain(key.data)
        if not ready:
            self._look_after()

    def _answer_cancelled(self) -> None:
        """Requests that were cancelled before their turn, while the last one's remains are cleared away."""
        for request in [one for one in self.link.requests if one["job"] in self.link.cancelled]:
            if request["op"] != "check_task":
                self.link.requests.remove(request)
                self.link.cancelled.discard(request["job"])
                verdict: dict[str, object] = {
                    "candidate": Candidate(request["candidate"]).hash,
                    "status": Status.CANCELLED,
                    "reason": "cancelled",
                    "device": self.device,
                    "sandbox": self.level,
                    "stages": {},
                }
                self.link.send({"job": request["job"], "verdict": verdict})

    def _take(self, child: Child) -> None:
        try:
            message, fds = child.channel.recv_fds(2 if child is self.judge else 0)
            child.fds += fds
        except (WireError, OSError):
            message = {"event": "error", "kind": "rejected", "line": "forged message", "text": "forged message"}
        if message is None:
            self._forget(child)
            self._drain(child)
            child.exit_code = children.exit_code_of_closed(child.pid, DYING_S)
        elif len(child.inbox) <= child.pending + 1:
            child.heard = time.monotonic()
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
        kind = Lost if "SIGKILL" in how else Ended
        if child is self.judge:
            self.end(child)
            return kind(Status.RUNTIME_ERROR, f"the task's reference failed: its process was {how}", printed)
        return kind(Status.CRASH, f"its process {how} while {doing}", printed)

    def _overdue(self, child: Child, seconds: float, doing: str) -> Ended:
        if child is self.judge:
            self.end(child)
            return Ended(Status.RUNTIME_ERROR, f"the task's reference takes more than {seconds:g} s ({doing})")
        return Ended(Status.TIMEOUT, f"{doing} took more than {seconds:g} s")


def candidate_fault(kind: str, line: str, text: str, stage: str) -> Ended:
    """What an error message of a candidate's process means."""
    if kind in (Status.REJECTED, Status.COMPILE_ERROR, Status.WRONG):
        return Ended(Status(kind), line, text if kind == Status.COMPILE_ERROR else "")
    first = line.splitlines()[0] if line else "no message"
    digest = error_digest(text)
    if stage == "import" or is_compile_error(text):
        return Ended(Status.COMPILE_ERROR, digest.splitlines()[0] if digest else first, digest or first)
    told = digest.splitlines()[0] if digest and first.rstrip().endswith(":") else first
    return Ended(Status.RUNTIME_ERROR, told, digest or first)


def _threads(count: int) -> dict[str, str]:
    return {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} | {
        "MAX_JOBS": "2"
    }

"""A worker: a process with torch imported that forks judges and candidates, keeps the clock and never runs their code.

It talks to the pool over one socket of JSON lines (pool -> worker: evaluate, check_task, cancel; worker -> pool:
ready, stage, verdict, task). When that socket closes, everything below it is killed and it exits.
"""

from __future__ import annotations

import importlib.util
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

from . import children, sandbox, warm
from .base import Candidate, Status, Task
from .buildcache import BuildFolder, PreparedFolder, sweep
from .children import Child
from .digest import error_digest, is_compile_error
from .gpulock import gpu_turn
from .gpustate import GpuState
from .guards import Guard
from .limits import EvaluationLimits
from .wire import Channel, WireError, clip

TICK_S = 0.1
CANCEL_PATIENCE_S = 0.1
PROBE_S = 2.0
WARM_S = 30.0
TRITON_DRIVER, TRITON_DRIVER_S = "triton-driver", 30.0
DYING_S = 5.0


class Ended(Exception):
    """An evaluation ends here, with this status."""

    def __init__(self, status: Status, reason: str, digest: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.digest = status, reason, digest


class JudgeLost(Ended):
    """Somebody killed the judge: neither the task's fault nor the candidate's."""


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
        self.judge_placed = False
        self.candidate: Child | None = None
        self.spare: Child | None = None
        self.spare_build: PreparedFolder | None = None
        self.spare_judge: Child | None = None
        self.dying: list[Child] = []
        self.regions: tuple[int, ...] = ()  # those on the host of the candidate that runs
        self.on_gpu = device.startswith("cuda")
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
        readable = (self.triton_base,) if self.triton_base is not None else ()
        policy = sandbox.Policy(writable=(scratch, build), device=self.device, level=level, readable=readable)
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
        self._disown(child)
        left = children.kill_tree(child.pid, self._others(child))
        if left:
            print(f"processes that don't die after SIGKILL: {left}", file=sys.stderr, flush=True)
        self._discard(child)

    def silence_candidate(self) -> None:
        """Nothing of the candidate runs any more; bury_candidate() waits until it is gone, GPU memory and all."""
        self._silence(self.candidate)

    def _silence(self, child: Child | None) -> None:
        if child is not None:
            children.silence(child.pid, self._others(child))
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
        known = (self.judge, self.candidate, self.spare, self.spare_judge, *self.dying)
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
            child.exit_code = children.exit_code(child.pid, wait_s=0.15)
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
        if child is self.judge:
            self.end(child)
            kind = JudgeLost if "SIGKILL" in how else Ended
            return kind(Status.RUNTIME_ERROR, f"the task's reference failed: its process was {how}", printed)
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
        self._silence(self.judge)
        seed = int.from_bytes(os.urandom(6), "little")
        self.judge_key = task.hash
        if self.spare_judge is not None and self.spare_judge.warm and not (self.spare_judge.ended or task.files):
            self.judge, self.spare_judge = self.spare_judge, None
            (self.judge.scratch / warm.SOURCE).write_text(task.source, errors="surrogatepass")
            self.ask(self.judge, {"op": "judge", "name": task.name, "seed": seed})
            return self.judge
        device = self.device
        files = {name: os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in task.files if os.path.isfile(name)}

        def entry(channel: Channel) -> None:
            from . import judge

            judge.main(channel, task, device, seed, files)

        self.judge = self.fork("judge", entry, tuple(files.values()), {})
        for fd in files.values():
            os.close(fd)
        self.judge.pending = 1
        return self.judge

    def wait(self, seconds: float) -> None:
        """Between two tries for the GPU: live on. Raises Ended when the job at hand is cancelled."""
        self.heed_cancel()
        self.pump(seconds)

    def release_judge(self) -> None:
        """The judge gives back what it holds for a candidate; one that doesn't do so soon is ended.

        On a GPU its answer shows that the GPU still runs kernels.
        """
        judge = self.judge
        if judge is None or judge.ended:
            return
        patience = CANCEL_PATIENCE_S if self.job in self.link.cancelled else PROBE_S
        try:
            self.ask(judge, {"op": "release"})
            while judge.pending:
                self.reply(judge, patience, "giving memory back", heed_cancel=False)
        except Ended:
            self.end(self.judge)

    def start_candidate(self, candidate: Candidate, regions: tuple[int, ...], build: BuildFolder) -> Child:
        """The spare takes the candidate on where it was made for this build folder, else a fresh process does."""
        usable = self.spare is not None and self.spare_build is None and not self.spare.ended and not build.hit
        if usable and Guard.SANDBOX not in self.guards_off:
            child, self.spare = self.spare, None
        else:
            child = self._fork_waiting(build.path)
        assert child is not None
        self.regions, self.candidate = regions, child
        (child.scratch / warm.SOURCE).write_text(candidate.source, errors="surrogatepass")
        role = {"op": "candidate", "source_bytes": self.limits.source_bytes, "guards_off": sorted(self.guards_off)}
        self.ask(child, role, regions)
        return child

    def take_prepared(self) -> PreparedFolder | None:
        """The folder that the spare may write to, for the build of the candidate that it takes on."""
        if self.spare is None or self.spare.ended or Guard.SANDBOX in self.guards_off:
            return None
        folder, self.spare_build = self.spare_build, None
        return folder

    def _fork_waiting(self, build: Path) -> Child:
        device, base = self.device, self.triton_base
        extra = {"TORCH_EXTENSIONS_DIR": str(build / "torch"), "TRITON_CACHE_DIR": str(build / "triton")}
        child = self.fork("candidate", lambda channel: warm.main(channel, device, base), (), extra)
        child.warm = not self.on_gpu
        return child

    def renew_spare(self) -> None:
        """Have a process ready for the next candidate; on a GPU, where a context takes its time, for a task too."""
        if self.spare is not None and (self.spare.ended or self.spare_build is None):
            self.end(self.spare)
        if not self.limits.spares:
            return
        if self.spare is None:
            self.spare_build = self.spare_build or PreparedFolder(self.cache)
            self.spare = self._fork_waiting(self.spare_build.path)
        if self.on_gpu and (self.spare_judge is None or self.spare_judge.ended):
            self.end(self.spare_judge)
            device = self.device
            self.spare_judge = self.fork("judge", lambda channel: warm.main(channel, device, None), (), {})

    def begin_warming(self) -> None:
        """The spares make their CUDA contexts; await_warm() waits for them. Only in this worker's turn on the GPU."""
        self.renew_spare()
        for spare in (self.spare, self.spare_judge):
            if spare is not None and not spare.warm and not spare.pending:
                self.ask(spare, {"op": "warm"})

    def await_warm(self, *, heed_cancel: bool = False) -> None:
        """Raises Ended only when the job at hand is cancelled and that is heeded; a spare that stays cold is ended."""
        for spare in (self.spare, self.spare_judge):
            if spare is not None and spare.pending:
                self.gpu_fault = self._warm_fault(spare, heed_cancel)
                spare.warm = not self.gpu_fault
                if self.gpu_fault:
                    self.end(spare)
                    return

    def _warm_fault(self, spare: Child, heed_cancel: bool) -> str:
        try:
            answer = self.reply(spare, WARM_S, "making a CUDA context", heed_cancel=heed_cancel)
            return str(answer.get("fault", ""))
        except Ended as ended:
            if ended.status is Status.CANCELLED:
                raise
            return ended.reason

    def clear_gpu(self) -> None:
        """The end of a turn on the GPU: nothing of the candidate is left there, and the GPU still answers.

        The judge shows it; one that did not answer is gone, and then a fresh context does.
        """
        self.begin_warming()
        self.bury_candidate()
        self.release_judge()
        if self.judge is None and self.limits.spares:
            self.end(self.spare)
            self.begin_warming()
        self.await_warm()

    def require_gpu(self) -> None:
        """In this worker's turn. Raises Ended when the GPU did not answer after the last turn and doesn't now."""
        if self.gpu_fault:
            self.begin_warming()
            self.await_warm(heed_cancel=True)
        if self.gpu_fault:
            reason = f"the GPU does not answer, for no fault of this candidate: {self.gpu_fault}"
            raise Ended(Status.CRASH, reason)

    def prepare(self) -> None:
        """What the first candidate need not wait for."""
        sweep(self.cache)
        if self.on_gpu:
            self.triton_base = self._build_triton_driver()
        self.renew_spare()
        if self.on_gpu and self.spare is not None:
            with gpu_turn(self.device, self.pump):
                self.begin_warming()
                self.await_warm()

    def _build_triton_driver(self) -> Path | None:
        """Triton's own C module, compiled once for every candidate, by a process that runs nobody's code."""
        if importlib.util.find_spec("triton") is None:
            return None
        base = self.cache / TRITON_DRIVER
        base.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid == 0:
            children.die_with_parent()
            try:
                warm.load_triton_driver(base)
            finally:
                os._exit(0)
        children.exit_code(pid, wait_s=TRITON_DRIVER_S)
        return base

    def serve(self) -> None:
        """Answer the pool until it goes."""
        from .evaluate import check_task, evaluate

        try:
            self.prepare()
            self.link.send({"ready": True, "sandbox": self.level})
            while True:
                while self.link.requests:
                    request = self.link.requests.popleft()
                    self.job = request["job"]
                    if request["op"] == "check_task":
                        self.link.send(check_task(self, request))
                    else:
                        evaluate(self, request)
                    self.link.cancelled.discard(self.job)
                    self.job = ""
                    self.renew_spare()
                self.pump(5.0)
        except (PoolGone, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            for child in (self.candidate, *self.dying, self.spare, self.spare_judge, self.judge):
                self.end(child)
            if self.spare_build is not None:
                self.spare_build.close(keep=False)
            if self.gpu_state is not None:
                self.gpu_state.close()


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

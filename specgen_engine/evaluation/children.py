"""Forking, watching and ending the processes of an evaluation. Nothing here touches CUDA or starts a thread."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .limits import EvaluationLimits
from .wire import Channel

KEEP_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TZ", "CXX", "CC")
OUTPUT_KEPT = 16 << 10
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Child:
    """A forked process: its channel, what it printed (head kept, all counted) and messages not yet taken."""

    kind: str
    pid: int
    channel: Channel
    output_fd: int
    inbox: deque[dict[str, object]] = field(default_factory=deque)
    output: bytearray = field(default_factory=bytearray)
    printed: int = 0
    pending: int = 0
    ended: bool = False
    exit_code: int | None = None
    scratch: Path = Path()
    heard: float = 0.0  # time.monotonic() of its latest message
    warm: bool = False  # its CUDA context is made, or none is needed
    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        """Close the descriptors that came with its messages."""
        while self.fds:
            os.close(self.fds.pop())

    def how_it_ended(self) -> str:
        if self.exit_code is None:
            return "closed its channel"
        if self.exit_code < 0 or self.exit_code > 128:
            number = -self.exit_code if self.exit_code < 0 else self.exit_code - 128
            try:
                return f"killed by {signal.Signals(number).name}"
            except ValueError:
                return f"killed by signal {number}"
        return f"ended by itself with exit code {self.exit_code}"


def become_subreaper() -> None:
    """Orphans of candidates become this process's children, so that none is lost."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def fork_child(
    kind: str,
    entry: Callable[[Channel], None],
    *,
    keep: tuple[int, ...],
    scratch: Path,
    limits: EvaluationLimits,
    enter_sandbox: Callable[[], None],
    environment: dict[str, str],
    cap_memory: bool,
) -> Child:
    """A fresh process in its own session and scratch folder that runs entry(channel) and exits.

    keep: descriptors it inherits besides its channel. The caller's other descriptors are closed in it.
    """
    ours, theirs = Channel.pair()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid:
        _statuses.pop(pid, None)  # of an orphan that had this number before, and that nobody asked about
        theirs.close()
        os.close(write_end)
        os.set_blocking(read_end, False)
        return Child(kind, pid, ours, read_end)
    code = 1
    try:
        die_with_parent()
        os.setsid()
        _redirect(write_end)
        _close_others({0, 1, 2, theirs.fileno(), *keep})
        _set_environment(scratch, environment)
        _set_limits(limits, cap_memory)
        enter_sandbox()
        import torch

        torch.set_num_threads(limits.threads)
        gc.enable()
        entry(theirs)
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="replace")[:4000])
    finally:  # nothing may unwind into the parent's stack
        os._exit(code)


def _redirect(write_end: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in enumerate("rww"))


def _close_others(keep: set[int]) -> None:
    start = 0
    for fd in sorted(keep):
        if start < fd:  # an empty range would reach close_range(2) as one without end
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)


def _set_environment(scratch: Path, environment: dict[str, str]) -> None:
    kept = {name: os.environ[name] for name in KEEP_ENVIRONMENT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=str(scratch), TMPDIR=str(scratch), USER="candidate", **environment)
    tempfile.tempdir = str(scratch)
    os.chdir(scratch)


def _set_limits(limits: EvaluationLimits, cap_memory: bool) -> None:
    wanted = {  # no RLIMIT_CPU: it makes the process's CPU clock advance by scheduler ticks of 4 ms only
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: limits.memory_bytes,
        resource.RLIMIT_NOFILE: 4096,
        resource.RLIMIT_NPROC: 4096,
    }
    if cap_memory:
        now = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
        wanted[resource.RLIMIT_DATA] = now + limits.memory_bytes
    for name, value in wanted.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def _children_now(pid: int) -> list[int]:
    """Quick (all processes' parents take 1 ms and more to read), but one may be missed while its sibling ends."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())
    except OSError:
        pass
    return found


def _children_listed() -> Callable[[int], Iterable[int]]:
    """The same from one listing of all processes: none that has a parent is missed."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        if state := _state_of(int(name)):
            children.setdefault(state[0], []).append(int(name))
    return lambda pid: children.get(pid, ())


def _state_of(pid: int) -> tuple[int, bool] | None:
    """(parent, is it a zombie or in the kernel's exit path), None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1]), fields[0] in b"ZX" or bool(int(fields[6]) & 0x4)  # PF_EXITING


def descendants(pid: int, children: Callable[[int], Iterable[int]], spare: Iterable[int] = ()) -> set[int]:
    """All below a process but the trees of spare."""
    found: set[int] = set()
    wave = [pid]
    while wave:
        wave = [child for parent in wave for child in children(parent) if child not in found and child not in spare]
        found.update(wave)
    return found


def innermost(pid: int, around: int) -> int:
    """The process that runs the code, below `around` processes that a sandbox put around it."""
    for _ in range(around):
        try:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        except (OSError, IndexError):
            break
    return pid


def held_bytes(pid: int) -> tuple[int, int]:
    """(anonymous and shared resident bytes, processes) of a process and all below it."""
    total = count = 0
    for process in (pid, *descendants(pid, _children_listed())):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
        count += 1
    return total, count


def silence(pid: int, spare: set[int], patience_s: float = 5.0) -> None:
    """SIGKILL a child, its group and everything below or orphaned from it; none runs its code when this returns.

    They may still be on their way out (a CUDA context takes the driver some time): see kill_tree.
    """
    _kill_all(pid, spare, patience_s, leaving_counts=False)


def kill_tree(pid: int, spare: set[int], patience_s: float = 5.0) -> list[int]:
    """The same, and wait until all are gone; returns the pids that would not die.

    spare: this process's other children, whose trees live on. Processes that left the group by setsid or double
    fork are found as descendants, or as orphans handed to this subreaper. A pid that was collected may be anybody's by
    now, and is left alone.
    """
    return _kill_all(pid, spare, patience_s, leaving_counts=True)


def _kill_all(pid: int, spare: set[int], patience_s: float, *, leaving_counts: bool) -> list[int]:
    deadline, left = time.monotonic() + patience_s, list[int]()
    while True:
        if pid not in spare and (_state_of(pid) or (0,))[0] == os.getpid():
            for group in (os.killpg, os.kill):
                try:
                    group(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
        doomed = {*left, *descendants(os.getpid(), _children_now, spare)}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: a fork bomb must not outrun the killing
            for one in doomed:
                _signal(one, number)
        reap()
        left = _left(spare, _children_now, leaving_counts) or _left(spare, _children_listed(), leaving_counts)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.001)


def _left(spare: set[int], children: Callable[[int], Iterable[int]], leaving_counts: bool) -> list[int]:
    """This process's descendants outside the spared trees, those that are on their way out where they count."""
    states = {pid: _state_of(pid) for pid in descendants(os.getpid(), children, spare)}
    return [pid for pid, state in states.items() if state and (leaving_counts or not state[1])]


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


_statuses: dict[int, int] = {}
CLOSING_S = 0.15  # from a closed channel to an exit code, where no GPU is in the way


def reap() -> None:
    """Collect every ended child; exit_code() gives the statuses."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _statuses[pid] = os.waitstatus_to_exitcode(status)


def exit_code_of_closed(pid: int, patience_s: float) -> int | None:
    """The same for a child whose channel has just closed: waited for while it, or what its sandbox put below it, is in
    the kernel's exit path, where a socket is closed long before a CUDA context is gone (seen on an H200: a candidate
    that was killed from outside had no exit code 0.15 s later, and passed for one that had closed its channel)."""
    code = exit_code(pid, wait_s=CLOSING_S)
    deadline = time.monotonic() + patience_s
    while code is None and time.monotonic() < deadline:
        states = [_state_of(one) for one in (pid, *descendants(pid, _children_now))]
        if not any(state is not None and state[1] for state in states):
            return exit_code(pid, wait_s=CLOSING_S)
        code = exit_code(pid, wait_s=CLOSING_S)
    return code


def exit_code(pid: int, wait_s: float = 0.0) -> int | None:
    """How a child ended (negative: by that signal), None while it runs. Each status is given once."""
    deadline = time.monotonic() + wait_s
    while True:
        reap()
        if pid in _statuses or time.monotonic() >= deadline:
            return _statuses.pop(pid, None)
        time.sleep(0.002)

"""What a candidate's process may reach: its scratch folder, the installed software, nothing else.

Three levels, the best that the machine offers; the one in force is in every verdict:

- ``namespaces+landlock+seccomp``: own user, PID, mount, network and IPC namespaces around the next two.
- ``landlock+seccomp``: file access and signals by Landlock, system calls and sockets by seccomp.
- ``process``: a process of its own with limits and a scrubbed environment, no kernel isolation.

bubblewrap makes the same namespaces but needs an exec, which would give up the warm fork (about 3 s of imports a
candidate), so they are made here directly.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import signal
import struct
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

FULL, KERNEL, PROCESS = "namespaces+landlock+seccomp", "landlock+seccomp", "process"
FILES = "landlock (files)"
"""For a candidate under a profiler, which opens sockets to it: file access and signals alone are confined."""

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID_NODEV_NOEXEC, _MS_REC_PRIVATE = 0x2 | 0x4 | 0x8, 0x4000 | 0x40000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 28, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE, _IOCTL = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
_READ_ONLY = _EXECUTE | _READ | _LIST
_DEVICE = _READ | _WRITE | _IOCTL
_FILE_RIGHTS = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL

_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt", "/nix/store", "/proc", "/sys")
_SYSTEM_FILES = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "alternatives", "nsswitch.conf", "passwd")
_DEVICES = ("null", "zero", "full", "random", "urandom")

# x86-64 numbers of calls that a kernel never makes and a break-out does
_DENIED_CALLS = {
    101: "ptrace", 155: "pivot_root", 161: "chroot", 165: "mount", 166: "umount2", 167: "swapon", 169: "reboot",
    175: "init_module", 246: "kexec_load", 248: "add_key", 249: "request_key", 250: "keyctl", 272: "unshare",
    298: "perf_event_open", 304: "open_by_handle_at", 308: "setns", 310: "process_vm_readv", 311: "process_vm_writev",
    313: "finit_module", 321: "bpf", 323: "userfaultfd", 425: "io_uring_setup", 428: "open_tree", 429: "move_mount",
    430: "fsopen", 432: "fsmount", 438: "pidfd_getfd", 442: "mount_setattr",
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET = 56, 435, 41


class SandboxError(RuntimeError):
    """The level asked for is not to be had on this machine."""


@dataclass(frozen=True)
class Policy:
    """writable, readable: folders that exist. level: one of the three names above."""

    writable: tuple[Path, ...]
    device: str
    level: str
    readable: tuple[Path, ...] = ()


def level(wanted: str, device: str = "cpu") -> str:
    """The level for off, prefer or require at which the device works. Raises SandboxError when require can't be met."""
    if wanted == "off":
        return PROCESS
    if best := offered(device):
        return best[0]
    if wanted == "require":
        raise SandboxError(
            "sandbox=require: this kernel offers no Landlock (Linux 5.13, x86-64 seccomp); use prefer or another host"
        )
    return PROCESS


def offered(device: str = "cpu") -> tuple[str, ...]:
    """The levels above PROCESS that this machine offers, best first."""
    return tuple(name for name in (FULL, KERNEL) if _works(name, device))


def around(name: str) -> int:
    """How many processes a level puts between the forked one and the one that runs the code."""
    return 2 if name == FULL else 0


def files_level(device: str = "cpu") -> str:
    """FILES where Landlock and the device work together, else PROCESS."""
    return FILES if _works(FILES, device) else PROCESS


@functools.cache
def _works(name: str, device: str = "cpu") -> bool:
    """Try a level, and the GPU in it, in a throw-away process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            enter(Policy((), device, name))
            code = 0 if device == "cpu" or _reaches(device) else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def _reaches(device: str) -> bool:
    """Can a candidate use the GPU from here? What its first launch asks of the driver, and of NVML through torch."""
    import torch

    try:
        torch.cuda.init()
        torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, OSError) as error:
        print(f"specgen: a GPU can't be used in a stronger sandbox here: {error}"[:400], file=sys.stderr, flush=True)
        return False
    return True


def enter(policy: Policy) -> None:
    """Confine the calling process for good. With namespaces it returns in a grandchild; the caller's own process
    stays behind to pass on the exit code. Raises OSError when the kernel refuses.
    """
    if policy.level == PROCESS:
        return
    if policy.level == FULL:
        _enter_namespaces()
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _restrict_files(policy)
    if policy.level == FILES:
        return
    _drop_capabilities()
    _restrict_calls()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# -- namespaces --------------------------------------------------------------------------------------------------------


def _enter_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_NEWUSER | _NEWPID | _NEWNS | _NEWNET | _NEWIPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    _fork_and_follow()
    _check(_libc.mount(None, b"/", None, _MS_REC_PRIVATE, None), "private mounts")
    # Refused where a container masks parts of /proc: then other processes' names can be read, nothing be done to them.
    _libc.mount(b"proc", b"/proc", b"proc", _MS_NOSUID_NODEV_NOEXEC, None)
    _fork_and_follow()  # the code must not be the namespace's init, which ignores signals it sends itself


def _fork_and_follow() -> None:
    """Go on in a child; this process waits, collects orphans, and ends as the child does."""
    pid = os.fork()
    if pid == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    os.closerange(3, 1 << 20)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(128 - code if code < 0 else code)


# -- Landlock ----------------------------------------------------------------------------------------------------------


def _restrict_files(policy: Policy) -> None:
    abi = _check(_libc.syscall(_CREATE_RULESET, None, 0, 1), "landlock")
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network = 0b11 if abi >= 4 and policy.level != FILES else 0
    scoped = (0b10 if policy.level == FILES else 0b11) if abi >= 6 else 0  # the profiler's abstract socket lies outside
    attributes = struct.pack("QQQ", handled, network, scoped)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = _check(_libc.syscall(_CREATE_RULESET, attributes, size, 0), "landlock ruleset")
    try:
        for path in [*_readable(), *policy.readable]:
            _allow(rules, path, _READ_ONLY & handled)
        devices = [Path("/dev") / name for name in _DEVICES]
        if policy.device.startswith("cuda"):
            devices += [*Path("/dev").glob("nvidia*")]
        for path in devices:
            _allow(rules, path, (_DEVICE if path.is_file() or not path.is_dir() else _DEVICE | _LIST) & handled)
        for path in policy.writable:
            _allow(rules, path, handled)
        if policy.device.startswith("cuda"):
            _allow_thread_names(rules, handled)
        _check(_libc.syscall(_RESTRICT_SELF, rules, 0), "landlock restrict")
    finally:
        os.close(rules)


def _readable() -> list[Path]:
    folders = [Path(name) for name in _SYSTEM_FOLDERS]
    folders += [Path("/etc") / name for name in _SYSTEM_FILES]
    folders += [Path(sys.prefix), Path(sys.base_prefix), Path(sysconfig.get_paths()["purelib"])]
    folders += [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    folders += [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    return folders


def _allow_thread_names(rules: int, handled: int) -> None:
    """cuInit names its threads through /proc/self/task/*/comm and fails where it may not (error 304, seen on an H200).

    The rule binds to the folder's inode, which must stay: hence a descriptor that is never closed.
    """
    os.open("/proc/self/task", os.O_PATH | os.O_CLOEXEC)
    _allow(rules, Path("/proc/self/task"), (_READ_ONLY | _WRITE | _TRUNCATE) & handled)


def _allow(rules: int, path: Path, access: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            access &= _FILE_RIGHTS
        rule = struct.pack("=Qi", access, fd)
        _check(_libc.syscall(_ADD_RULE, rules, 1, rule, 0), f"landlock rule for {path}")
    finally:
        os.close(fd)


# -- capabilities and seccomp ------------------------------------------------------------------------------------------


def _drop_capabilities() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    _libc.prctl(_PR_SET_SECUREBITS, 0b11, 0, 0, 0)  # noroot, locked: exec as uid 0 gives no capabilities back
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, nothing), "capset")


def _restrict_calls() -> None:
    if platform.machine() != "x86_64":
        raise OSError(38, "the seccomp filter knows x86-64 only")
    load, equal, bits, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (give, 0, 0, refuse),  # another architecture's calls
        (load, 0, 0, 0), (bits, 0, 1, 0x40000000), (give, 0, 0, refuse),  # x32
    ]  # fmt: skip
    for number in _DENIED_CALLS:
        program += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]  # its flags are in memory; libc falls back to clone
    program += [(equal, 0, 4, _CLONE), (load, 0, 0, 16), (bits, 0, 1, _NEWUSER), (give, 0, 0, refuse), (load, 0, 0, 0)]
    program += [(equal, 0, 3, _SOCKET), (load, 0, 0, 16), (equal, 1, 0, 1), (give, 0, 0, refuse), (give, 0, 0, allow)]
    packed = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    filter_program = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, filter_program, 0, 0), "seccomp")

"""A process that waits ready for a candidate or a task: imports, sandbox and, on a GPU, its context are behind it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from . import judge, subject
from .base import Candidate, Task
from .clock import CudaClock
from .compare import difference, largest_errors, same_bits
from .guards import parse_guards
from .wire import Channel

SOURCE = "source.txt"
"""The candidate's text, put into the process's scratch folder: it may be longer than a message."""


def main(channel: Channel, device: str, triton_base: Path | None, *, compares: bool = False) -> None:
    """Serve until the role that it was given ends, or the supervisor closes the channel.

    compares: it waits for a task, so that its kernels will be those of a comparison.
    """
    while True:
        message, fds = channel.recv_fds(2)
        if message is None:
            return
        if message["op"] == "warm":
            channel.send({"event": "warm", "fault": _warm(device, triton_base, compares)})
            continue
        source = Path(SOURCE).read_text(errors="surrogatepass")
        if message["op"] == "judge":
            judge.main(channel, Task(source, str(message["name"])), device, int(str(message["seed"])), {})
            return
        guards_off = parse_guards(list(message["guards_off"]))  # type: ignore[call-overload]
        limit = int(str(message["source_bytes"]))
        subject.main(channel, Candidate(source), device, tuple(fds), limit, guards_off)
        return


def _warm(device: str, triton_base: Path | None, compares: bool) -> str:
    """Make the context, run one kernel in it, load Triton's driver module. What was wrong, or ""."""
    try:
        CudaClock(device).settle()
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
        if compares:
            compare_anything(device)
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()  # only the context stays
    except (RuntimeError, AssertionError, OSError) as error:
        return f"{type(error).__name__}: {error}"[:400]
    if triton_base is not None:
        load_triton_driver(triton_base)
    return ""


def compare_anything(device: str) -> None:
    """CUDA loads a kernel, and cuBLAS itself, on first use: a task's first comparison finds them loaded."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        drawn = torch.randn(64, 64, device=device, dtype=dtype)
        result, again = drawn @ drawn, drawn @ drawn
        difference(result, again)
        largest_errors(result, again)
        same_bits(result, again)


def load_triton_driver(base: Path) -> None:
    """Triton's own C module, compiled on first use (gcc, about a second) and kept in its cache folder: take base's.

    Without it a candidate compiles it again, so nothing is lost where this fails.
    """
    own = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(base)
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018  (a lazy property)
    except Exception as error:  # no compiler, no libcuda ...: the candidate's verdict will say
        print(f"triton's driver module is not ready: {error}"[:400], file=sys.stderr, flush=True)
    finally:
        os.environ.pop("TRITON_CACHE_DIR")
        if own is not None:
            os.environ["TRITON_CACHE_DIR"] = own

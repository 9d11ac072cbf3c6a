"""Entry of a worker process: python -m specgen_engine.evaluation.worker_main FD DEVICE CACHE SCRATCH LIMITS-JSON

With a last argument `build` it is a builder (builder.py).
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from unittest import mock

from . import children
from .limits import EvaluationLimits
from .sandbox import SandboxError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES, LARGEST_KEPT_BYTES = 1 << 30, 32 << 20
"""The second is the most that glibc takes as a threshold."""


def main() -> None:
    """Import everything that forked children need, then serve. The scratch folder goes with the process: a pool that
    was killed can't remove it."""
    try:
        serve(*sys.argv[1:6], builds=sys.argv[6:] == ["build"])
    finally:
        shutil.rmtree(sys.argv[4], ignore_errors=True)


def serve(fd: str, device: str, cache: str, scratch: str, limits: str, *, builds: bool) -> None:
    children.become_subreaper()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import_for_children(device)
    import torch

    from .builder import Builder
    from .worker import Link, Worker

    torch.set_num_threads(1)
    if device == "cpu":
        keep_freed_memory()
    gc.collect()
    gc.freeze()
    link = Link(socket.socket(fileno=int(fd)))
    if device.startswith("cuda") and not _children_can_use_cuda():
        link.send({"fatal": "CUDA was initialised in the worker before it forked: its children can't use the GPU"})
        return
    try:
        kind = Builder if builds else Worker
        worker = kind(link, device, EvaluationLimits(**json.loads(limits)), Path(cache), Path(scratch))
    except SandboxError as error:
        link.send({"fatal": str(error)})
        return
    worker.serve()


def keep_freed_memory() -> None:
    """A model's temporaries get the memory of the call before, here and in all that is forked; without glibc: nothing.

    By default glibc gives blocks back to the kernel or keeps them by what was freed before: with the page faults of a
    fresh block at each call, the same reference took 4.2 instead of 0.6 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def import_for_children(device: str) -> None:
    """Imports that each child would have to make, none of which may ask the driver anything.

    cpp_extension does when it is imported: asked through the CUDA runtime, no child could use CUDA; asked through NVML,
    children inherit a library whose descriptors are closed (on an H100 most launches then failed: Invalid device id).
    """
    import torch

    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        import torch.utils.cpp_extension
    if device.startswith("cuda") and importlib.util.find_spec("triton"):
        import triton
        import triton.language  # noqa: F401  (0.5 s that each candidate would spend)

        from .triton_warmup import warm_up_compiler

        warm_up_compiler()

    from . import compare, evaluate, gpumemory, judge, subject, timing, warm  # noqa: F401
    from .candidates import load, plain_cuda, solution  # noqa: F401
    from .tasks import flashinfer_reference, gpumode_reference  # noqa: F401


def _children_can_use_cuda() -> bool:
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main()

"""Entry of a worker process: python -m specgen_engine.evaluation.worker_main FD DEVICE CACHE SCRATCH LIMITS-JSON"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import socket
import sys
from pathlib import Path
from unittest import mock

from . import children
from .limits import EvaluationLimits
from .sandbox import SandboxError


def main() -> None:
    """Import everything that forked children need, then serve."""
    fd, device, cache, scratch, limits = sys.argv[1:6]
    children.become_subreaper()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import_for_children(device)
    import torch

    from .worker import Link, Worker

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    link = Link(socket.socket(fileno=int(fd)))
    if device.startswith("cuda") and not _children_can_use_cuda():
        link.send({"fatal": "CUDA was initialised in the worker before it forked: its children can't use the GPU"})
        return
    try:
        worker = Worker(link, device, EvaluationLimits(**json.loads(limits)), Path(cache), Path(scratch))
    except SandboxError as error:
        link.send({"fatal": str(error)})
        return
    worker.serve()


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

    timing.speedup([1, 2, 3], [1, 2, 3])  # numpy's generator: 70 ms when first used
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

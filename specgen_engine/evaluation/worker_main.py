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

from . import children
from .limits import EvaluationLimits
from .sandbox import SandboxError


def main() -> None:
    """Import everything that forked children need, then serve."""
    fd, device, cache, scratch, limits = sys.argv[1:6]
    children.become_subreaper()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # cpp_extension asks for a GPU when it is imported; asked of the CUDA runtime, no forked child could use CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch
    import torch.utils.cpp_extension

    if device.startswith("cuda") and importlib.util.find_spec("triton"):
        import triton
        import triton.language  # noqa: F401  (0.5 s that each candidate would spend)

    from . import compare, evaluate, gpumemory, judge, subject, timing  # noqa: F401  (children must not import them from disk)
    from .worker import Link, Worker

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    link = Link(socket.socket(fileno=int(fd)))
    if device.startswith("cuda") and not _children_can_use_cuda():
        link.send({"fatal": "CUDA was initialised in the worker, so its children can't use it; does NVML work here?"})
        return
    try:
        worker = Worker(link, device, EvaluationLimits(**json.loads(limits)), Path(cache), Path(scratch))
    except SandboxError as error:
        link.send({"fatal": str(error)})
        return
    worker.serve()


def _children_can_use_cuda() -> bool:
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main()

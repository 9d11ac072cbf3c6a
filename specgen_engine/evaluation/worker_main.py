"""Entry of a worker process: python -m specgen_engine.evaluation.worker_main FD DEVICE CACHE SCRATCH LIMITS-JSON"""

from __future__ import annotations

import gc
import json
import logging
import socket
import sys
from pathlib import Path

from . import children
from .limits import EvaluationLimits
from .sandbox import SandboxError


def main() -> None:
    """Import everything that forked children need, then serve. Raises RuntimeError when CUDA got initialised."""
    fd, device, cache, scratch, limits = sys.argv[1:6]
    children.become_subreaper()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import torch
    import torch.utils.cpp_extension

    from . import compare, evaluate, judge, subject, timing  # noqa: F401  (children must not import them from disk)
    from .worker import Link, Worker

    torch.set_num_threads(1)
    if torch.cuda.is_initialized():
        raise RuntimeError("the worker must not initialise CUDA: a forked child could not use it")
    gc.collect()
    gc.freeze()
    link = Link(socket.socket(fileno=int(fd)))
    try:
        worker = Worker(link, device, EvaluationLimits(**json.loads(limits)), Path(cache), Path(scratch))
    except SandboxError as error:
        link.send({"fatal": str(error)})
        return
    worker.serve()


if __name__ == "__main__":
    main()

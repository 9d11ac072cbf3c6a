"""Tensor-parallel ranks of a test as forks of one process that has imported SGLang already."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable


def ranks_environment() -> dict[str, str]:
    """For the process that forks them: one thread each, gloo on loopback, no GPU.

    What imports SGLang asks for GPUs, and CUDA that was asked before a fork answers "initialization error" behind it,
    where SGLang makes its streams, though the ranks' pools are on the CPU. torch without a GPU makes none.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}


def fork_ranks(world: int, run_rank: Callable[[int], None]) -> int:
    """The exit status, 0 when every rank came to its end; when one fails, the others are ended."""
    ranks = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run_rank(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        ranks[pid] = rank
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.pop(pid, None)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failed

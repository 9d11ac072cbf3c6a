"""Which data-parallel replica a search runs on: its base, its forks, and what its scheduler is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Ranks:
    """Of `size` replicas, the one with the fewest running searches is next; among equals they take turns."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._last = size - 1

    def next(self, running: Iterable[int | None]) -> int | None:
        """running: the replica of each running search. None on a server without replicas: nothing is pinned."""
        if self.size == 1:
            return None
        counts = self.count(running)
        self._last = min(range(self.size), key=lambda rank: (counts[rank], (rank - self._last - 1) % self.size))
        return self._last

    def count(self, running: Iterable[int | None]) -> list[int]:
        """Searches on each replica."""
        held = list(running)
        return [held.count(rank) for rank in range(self.size)]


def gpus_of(server_args: Any) -> range:
    """The GPUs that a server's ranks run on; with DP attention replicas share those of the tensor-parallel ranks."""
    replicas = 1 if server_args.enable_dp_attention else server_args.dp_size
    step = server_args.gpu_id_step
    end = server_args.base_gpu_id + server_args.tp_size * replicas * step
    return range(server_args.base_gpu_id, end, step)

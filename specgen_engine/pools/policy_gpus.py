"""The GPUs of a pool as the policy sees them: role, job, and which may switch; no event or decision walks over them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from .policy import NEVER, GpuView, JobView, Role


@dataclass(slots=True)
class Gpu:
    """coming: it switches to its role without a job."""

    role: Role
    switched: float = NEVER
    job: JobView | None = None
    idle: bool = True
    coming: bool = False


class GpuSet:
    """counts, coming: GPUs by role. idle, movable (idle and past their dwell): their indices, the latest last."""

    def __init__(self, dwell_s: float) -> None:
        self._dwell_s = dwell_s
        self._gpus: dict[int, Gpu] = {}
        self._dwelling: list[tuple[float, int]] = []
        self.idle: dict[Role, dict[int, None]] = {role: {} for role in Role}
        self.movable: dict[Role, dict[int, None]] = {role: {} for role in Role}
        self.counts = dict.fromkeys(Role, 0)
        self.coming = dict.fromkeys(Role, 0)

    def __len__(self) -> int:
        return len(self._gpus)

    def __getitem__(self, index: int) -> Gpu:
        if index not in self._gpus:
            raise ValueError(f"gpu={index}: it is not in the pool (it has {sorted(self._gpus)[:16]})")
        return self._gpus[index]

    def add(self, index: int, role: Role, switched: float, *, idle: bool) -> None:
        if index in self._gpus:
            raise ValueError(f"gpu={index}: it is in the pool already")
        self._gpus[index] = Gpu(role, switched, idle=False)
        self.counts[role] += 1
        if idle:
            self.rest(index)

    def remove(self, index: int) -> Gpu:
        gpu = self[index]
        del self._gpus[index]
        self._arrive(gpu)
        self.counts[gpu.role] -= 1
        self.idle[gpu.role].pop(index, None)
        self.movable[gpu.role].pop(index, None)
        return gpu

    def rest(self, index: int) -> Gpu:
        """It is idle from now on, whatever it did."""
        gpu = self[index]
        self._arrive(gpu)
        gpu.idle = True
        self.idle[gpu.role][index] = None
        heapq.heappush(self._dwelling, (gpu.switched + self._dwell_s, index))
        return gpu

    def occupy(self, index: int, role: Role, now: float) -> bool:
        """It is no longer idle; whether it has to switch."""
        gpu = self[index]
        del self.idle[gpu.role][index]
        self.movable[gpu.role].pop(index, None)
        gpu.idle = False
        if gpu.role is role:
            return False
        self.counts[gpu.role] -= 1
        self.counts[role] += 1
        gpu.role, gpu.switched = role, now
        return True

    def come(self, index: int, role: Role, now: float) -> None:
        """It switches to a role without a job, to be ready there."""
        self.occupy(index, role, now)
        self[index].coming = True
        self.coming[role] += 1

    def wake(self, now: float) -> None:
        """Idle GPUs whose dwell is over may switch from now on; entries of busy and lost ones are dropped."""
        while self._dwelling and self._dwelling[0][0] <= now:
            ready, index = heapq.heappop(self._dwelling)
            gpu = self._gpus.get(index)
            if gpu is not None and gpu.idle and gpu.switched + self._dwell_s == ready:
                self.movable[gpu.role][index] = None

    def next_wake(self) -> float | None:
        return self._dwelling[0][0] if self._dwelling else None

    def movable_view(self, role: Role) -> GpuView:
        """The first one of the role that may switch."""
        index = next(iter(self.movable[role]))
        return GpuView(index, role, self[index].switched)

    def rested_last(self, role: Role, most: int) -> list[int]:
        """Idle ones of the role, the one that rested last first."""
        return list(islice(reversed(self.idle[role]), most))

    def roles(self) -> dict[int, Role]:
        return {index: gpu.role for index, gpu in self._gpus.items()}

    def at_work(self) -> Iterator[tuple[int, JobView]]:
        """Walks over all of them."""
        return ((index, gpu.job) for index, gpu in self._gpus.items() if gpu.job is not None)

    def check_integrity(self) -> None:
        """Raises AssertionError when counts and GPUs contradict each other."""
        for role in Role:
            of_role = [index for index, gpu in self._gpus.items() if gpu.role is role]
            assert self.counts[role] == len(of_role), f"{role}: {self.counts[role]} GPUs counted, {len(of_role)} there"
            assert set(self.idle[role]) == {index for index in of_role if self._gpus[index].idle}, f"{role}: idle GPUs"
            coming = sum(self._gpus[index].coming for index in of_role)
            assert self.coming[role] == coming, f"{role}: {self.coming[role]} GPUs counted as coming, {coming} are"
            assert set(self.movable[role]) <= set(self.idle[role]), f"{role}: movable GPUs that are not idle"

    def _arrive(self, gpu: Gpu) -> None:
        self.coming[gpu.role] -= gpu.coming
        gpu.coming = False

"""An evaluator's GPU whose spare memory is lent to the KV tier: quiet while it is timed, given back when it is needed.

For lenders that live in this process (kv/lender.py). The contract is Lending in base.py.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..config import KvConfig
from ..kv.base import Backend, LeaseRefused
from ..kv.cuda import CudaBackend
from ..kv.lender import MAX_QUIET_S, Lender
from ..kv.loopback import LoopbackBackend
from .policy import GpuView, Role, reclaim_ahead, to_reclaim

RENEW = 0.6
"""Share of a quiet spell after which the next one begins, so that there is no gap between them."""
REVOKE_S = 2.0
LEAD_S = 1.0
"""How far ahead of a job its memory is asked back (a busy lease of 1.4 GB took 20 ms to come)."""
REACH_S = 1.0
"""How long copies under way may take to drain: 4 GB at 300 GB/s are 13 ms."""


class LenderLending:
    """lenders: by device.  free_bytes: what a device has free now.  Devices without a lender are always quiet."""

    def __init__(self, lenders: Mapping[str, Lender], free_bytes: Callable[[str], int]) -> None:
        self._lenders, self._free_bytes = dict(lenders), free_bytes

    def lends(self, device: str) -> bool:
        return device in self._lenders

    @contextmanager
    def quiet(self, device: str, seconds: float) -> Iterator[bool]:
        """Yields whether every copy had drained. A spell of the lender is short, so it is renewed from a thread."""
        lender = self._lenders.get(device)
        if lender is None:
            yield True
            return
        spells = _Spells(lender, seconds)
        try:
            yield spells.reached
        finally:
            spells.close()

    def make_room(self, device: str, need_bytes: int) -> int:
        """Calls chunks back, from any borrower, until need_bytes are free or nothing is lent; returns what came."""
        lender = self._lenders.get(device)
        if lender is None:
            return 0
        return _call_back(lender, to_reclaim(self._view(0, device), need_bytes, lender.chunk_bytes))

    def make_room_ahead(self, starts_per_s: float, need_bytes: int) -> int:
        """What policy.reclaim_ahead asks back of these devices; returns what came."""
        devices = list(self._lenders)
        views = [self._view(number, device) for number, device in enumerate(devices)]
        wanted = reclaim_ahead(views, starts_per_s, LEAD_S, need_bytes)
        return sum(_call_back(self._lenders[devices[number]], size) for number, size in wanted.items())

    def close(self) -> None:
        """End the lenders; what they lent comes back or is theirs no more."""
        for lender in self._lenders.values():
            lender.close()

    def _view(self, number: int, device: str) -> GpuView:
        lender = self._lenders[device]
        counts = lender.counts()
        lent = (counts.total - counts.free) * lender.chunk_bytes
        return GpuView(number, Role.VALIDATE, free_bytes=self._free_bytes(device), lent_bytes=lent)


def lend_spare(device: str, size: str, name: str, directory: Path | None = None, chunk_mib: int = 64) -> LenderLending:
    """Lend memory of a device from this process, as `specgen lend` would from one of its own.

    device: cuda:N as this process counts, or cpu: the host's shared memory.  size: auto, 24GiB, ...
    name: of the lender's socket.
    Raises TierError for a size that can't be lent, KvError for a folder that is open to others.
    """
    from ..tier.lend import free_memory, parse_bytes, plan_offer

    kind, index = ("loopback", 0) if device == "cpu" else ("cuda", _physical(int(device.partition(":")[2] or 0)))
    offer = plan_offer(parse_bytes(size), free_memory(kind, index), chunk_mib << 20)
    memory: Backend = LoopbackBackend() if device == "cpu" else CudaBackend(int(device.partition(":")[2] or 0))
    folder = KvConfig(directory=directory).socket_directory
    lender = Lender(folder, name.replace("/", "-"), memory, offer.chunk_bytes, offer.chunks)
    return LenderLending({device: lender}, lambda _: free_memory(kind, index))


def _physical(index: int) -> int:
    """NVML's number of the GPU that this process calls cuda:index."""
    visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return int(visible[index]) if index < len(visible) and visible[index].isdigit() else index


def _call_back(lender: Lender, size: int) -> int:
    missing, back = math.ceil(size / lender.chunk_bytes), 0
    for epoch in lender.epochs().values():
        if missing <= 0:
            break
        try:
            report = lender.revoke(epoch, missing, REVOKE_S)
        except LeaseRefused:  # its borrower has gone
            continue
        back += report.chunks - report.outstanding
        missing -= report.chunks
    return back * lender.chunk_bytes


class _Spells:
    """One quiet spell after another, each begun before the last is over."""

    def __init__(self, lender: Lender, seconds: float) -> None:
        self._lender, self._ends = lender, time.monotonic() + seconds
        self._over = threading.Event()
        self._spell, self._length, self.reached = self._enter()
        self._thread = threading.Thread(target=self._renew, name="quiet-lease", daemon=True)
        self._thread.start()

    def _enter(self) -> tuple[AbstractContextManager[bool], float, bool]:
        length = max(0.01, min(MAX_QUIET_S, self._ends - time.monotonic()))
        spell = self._lender.quiet(length, min(length, REACH_S))
        return spell, length, spell.__enter__()

    def _renew(self) -> None:
        while not self._over.wait(self._length * RENEW) and time.monotonic() + self._length < self._ends:
            old = self._spell
            self._spell, self._length, _ = self._enter()
            old.__exit__(None, None, None)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._spell.__exit__(None, None, None)

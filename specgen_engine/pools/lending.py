"""An evaluator's GPU whose spare memory is lent to the KV tier: quiet while it is timed, given back when it is needed.

For lenders that live in this process (kv/lender.py). The contract is Lending in base.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from ..kv.base import LeaseRefused
from ..kv.lender import MAX_QUIET_S, Lender
from .policy import GpuView, Role, to_reclaim

RENEW = 0.6
"""Share of a quiet spell after which the next one begins, so that there is no gap between them."""
REVOKE_S = 2.0


class LenderLending:
    """lenders: by device.  free_bytes: what a device has free now.  Devices without a lender are always quiet."""

    def __init__(self, lenders: Mapping[str, Lender], free_bytes: Callable[[str], int]) -> None:
        self._lenders, self._free_bytes = lenders, free_bytes

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
        counts = lender.counts()
        lent = (counts.total - counts.free) * lender.chunk_bytes
        view = GpuView(0, Role.VALIDATE, free_bytes=self._free_bytes(device), lent_bytes=lent)
        missing = to_reclaim(view, need_bytes, lender.chunk_bytes) // lender.chunk_bytes
        back = 0
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
        spell = self._lender.quiet(length)
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

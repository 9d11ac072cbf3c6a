"""The transport's ways to move a transfer whose page tables the host has, as PageArena's copies do: one kernel, the
copy engine alone, pages packed by SMs and carried by the copy engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.kv_methods import Move, direction_of
from bench.kv_rig import Rig, Tables
from bench.kv_shapes import MIB
from specgen_engine.kv.native import _kv

STAGING_BYTES = 64 * MIB
DEEP_QUEUE, SHORT_QUEUE = 24, 4  # copies in flight while timing: small ones must not wait for the host
SMALL_BYTES = 16 * MIB


class Submitter:
    """Copies through `CudaCopier.submit`, all by one path.

    Args:
        sms: the copier's SM budget.
        staging_bytes: its local memory for the path STAGED.
        engines: the streams that carry its pieces.
    """

    def __init__(
        self,
        rig: Rig,
        direction: str,
        path: Any,
        sets: Sequence[Tables],
        sms: int,
        staging_bytes: int = STAGING_BYTES,
        engines: int = 2,
    ) -> None:
        self._copier = _kv.CudaCopier(
            rig.arena.layout, rig.base, rig.device.index, sms, 0.0, 10_000, staging_bytes, engines
        )
        self._way, self._path = direction_of(direction), path
        self._columns = {id(tables): self._host_columns(tables) for tables in sets}
        self._in_flight: deque[int] = deque()
        self._depth = DEEP_QUEUE if len(sets[0]) * rig.shape.page_bytes <= SMALL_BYTES else SHORT_QUEUE
        self._warm(sets[0])

    def queued(self) -> Move:
        """For timing on the device: enqueues, and waits only for copies far back."""

        def move(tables: Tables, stream: int) -> None:
            while len(self._in_flight) >= self._depth:
                self._finish(self._in_flight.popleft())
            ticket = self._submit(tables, stream)
            self._copier.order_after(ticket, stream)
            self._in_flight.append(ticket)

        return move

    def call(self) -> Move:
        """For verification, and for timing by the host's clock: returns when the bytes are there."""

        def move(tables: Tables, stream: int) -> None:
            self._drain()
            flags = self._finish(self._submit(tables, stream))
            if len(flags):
                tables.flags.copy_(torch.from_numpy(flags))

        return move

    def bare_call(self) -> Move:
        """As `call`, without leaving the flags where verification looks."""

        def move(tables: Tables, stream: int) -> None:
            self._finish(self._submit(tables, stream))

        return move

    def _warm(self, tables: Tables) -> None:
        """Page-table memory of all copies in flight is made here, not while timing."""
        self._in_flight.extend(self._submit(tables, 0) for _ in range(self._depth))
        self._drain()

    def _drain(self) -> None:
        while self._in_flight:
            self._finish(self._in_flight.popleft())

    def _submit(self, tables: Tables, stream: int) -> int:
        return int(self._copier.submit(self._way, *self._columns[id(tables)], stream, self._path))

    def _finish(self, ticket: int) -> np.ndarray:
        if not self._copier.wait(ticket, 20_000):
            raise RuntimeError("a copy is unfinished after 20 s")
        return self._copier.take_flags(ticket)

    @staticmethod
    def _host_columns(tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = [column.cpu().numpy() for column in tables[:3]]
        return columns[0], columns[1], columns[2].view(np.uint64)

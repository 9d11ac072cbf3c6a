"""How pages travel between device pool and arena: at once on a CPU, layer by layer beside the forward on a GPU."""

from __future__ import annotations

import ctypes
import logging
import time
from copy import copy
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import PageRefs, StalePages
from specgen_engine.kv.hold import Hold, hold, page_address, tags
from specgen_engine.kv.native import _kv
from specgen_engine.tier.base import PageShape
from specgen_engine.tier.metrics import Stats

logger = logging.getLogger(__name__)

IMPORT_LANE, EXPORT_LANE = 1, 2
STORAGE_WAIT_S = 0.5
LAYERS_PER_LAUNCH = 4


class PageMover(Protocol):
    """Moves pages of one device pool to and from one arena; called on the stream the copy belongs to."""

    def export(self, device_indices: torch.Tensor, chosen: NDArray[np.int64], refs: PageRefs) -> None:
        """Start writing the `chosen` of the device's pages. Raises StalePages or QuietLease, having copied nothing."""

    def begin_import(self, device_indices: torch.Tensor, held: list[Hold]) -> None:
        """Prepare reading pages that `held` keeps; they are let go when the last layer has arrived."""

    def import_layer(self, layer: int) -> None: ...

    def settle(self) -> None:
        """Look at imports that have ended since."""

    def read_page(self, ref: PageRefs) -> torch.Tensor:
        """(page_bytes,) uint8 in host memory. Raises StalePages, QuietLease."""

    def write_page(self, ref: PageRefs, data: torch.Tensor) -> None:
        """Raises StalePages, QuietLease."""


def refs_of(held: list[Hold]) -> PageRefs:
    """The pages of several holds, in order: what they were when they were held, whatever was revoked since."""
    return PageRefs(
        np.concatenate([one.refs.pages for one in held]), np.concatenate([one.refs.generations for one in held])
    )


def launch_groups(layers: int, most: int = LAYERS_PER_LAUNCH) -> list[range]:
    """The layers that one launch moves, in order: 1, 1, 2, then `most` at a time.

    The first layers come alone, so that the forward can begin. Later ones arrive before they are needed; together they
    cost fewer launches, which the scheduler makes before it can launch the forward.
    """
    groups: list[range] = []
    at = 0
    while at < layers:
        size = min(max(1, at), most)
        groups.append(range(at, min(layers, at + size)))
        at += size
    return groups


def tables_of(device_pages: torch.Tensor, table: torch.Tensor, flags: torch.Tensor) -> list[_kv.DeviceTables]:
    """What each launch of an import is given: the same pages, a row of flags of its own.

    Args:
        device_pages: (pages,) int64.
        table: (2, pages) int64, arena pages and generations.
        flags: (launches, pages) int32.
    """
    pages, arena_pages, first = device_pages.data_ptr(), table.data_ptr(), flags.data_ptr()
    generations, row = arena_pages + table.stride(0) * table.itemsize, flags.stride(0) * flags.itemsize
    return [
        _kv.DeviceTables(pages, arena_pages, generations, first + launch * row, len(device_pages), 1)
        for launch in range(len(flags))
    ]


class LoopbackMover:
    """Copies that are done when they return: a CPU has no stream that could order them."""

    def __init__(self, shape: PageShape, arena: PageArena, stats: Stats) -> None:
        self._shape, self._arena, self._stats = shape, arena, stats

    def _pages(self, device_indices: torch.Tensor) -> NDArray[np.int64]:
        return device_indices[:: self._shape.page_size].numpy() // self._shape.page_size

    def export(self, device_indices: torch.Tensor, chosen: NDArray[np.int64], refs: PageRefs) -> None:
        start = time.perf_counter()
        self._arena.export(self._pages(device_indices)[chosen], refs).result()
        self._stats.add("write_seconds", time.perf_counter() - start)

    def begin_import(self, device_indices: torch.Tensor, held: list[Hold]) -> None:
        refs = refs_of(held)
        start = time.perf_counter()
        copier = self._arena.copier
        ticket = copier.submit(_kv.Direction.IMPORT, self._pages(device_indices), refs.pages, refs.generations)
        while not copier.wait(ticket, 1000):
            logger.warning("a restore of %d pages from shared memory takes more than a second", len(refs))
        for one in held:
            one.release()
        if stale := int(np.count_nonzero(copier.take_flags(ticket) != _kv.PAGE_MATCHES)):
            _report_late(self._stats, stale)
        self._stats.add("restored_bytes", len(refs) * self._shape.page_bytes)
        self._stats.add("restore_seconds", time.perf_counter() - start)

    def import_layer(self, layer: int) -> None:
        """All layers came at once."""

    def settle(self) -> None:
        """Nothing is ever left to look at."""

    def read_page(self, ref: PageRefs) -> torch.Tensor:
        data = torch.empty(self._shape.page_bytes, dtype=torch.uint8)
        held = hold(self._arena, ref, _kv.Direction.IMPORT, quiet="wait", wait_s=STORAGE_WAIT_S)
        try:
            ctypes.memmove(data.data_ptr(), page_address(self._arena, int(ref.pages[0])), data.nbytes)
            _check_tag(self._arena, ref)
        finally:
            held.release()
        return data

    def write_page(self, ref: PageRefs, data: torch.Tensor) -> None:
        held = hold(self._arena, ref, _kv.Direction.EXPORT, quiet="wait", wait_s=STORAGE_WAIT_S)
        try:
            data = data.contiguous().view(torch.uint8)
            ctypes.memmove(page_address(self._arena, int(ref.pages[0])), data.data_ptr(), self._shape.page_bytes)
            ctypes.memmove(_tag_address(self._arena, ref), ref.generations.ctypes.data, 8)
        finally:
            held.release()


class _Transfer(NamedTuple):
    """One import under way; the tensors must outlive its kernels."""

    device_pages: torch.Tensor
    table: torch.Tensor
    flags: torch.Tensor
    launches: list[_kv.DeviceTables]
    pages: int
    held: list[Hold]
    start: torch.cuda.Event


class _Ended(NamedTuple):
    transfer: _Transfer
    end: torch.cuda.Event
    read: torch.cuda.Event
    matches: torch.Tensor


class CudaMover:
    """A kernel for one to four layers on the controller's load stream, one for all layers on its write stream.

    Tables are made on the host and copied without waiting. Restores overlap the forward: a layer's attention waits for
    the launch that brings that layer's pages only (HiCache's own events).
    """

    def __init__(self, shape: PageShape, arena: PageArena, stats: Stats) -> None:
        self._shape, self._arena, self._stats = shape, arena, stats
        self._device = torch.device("cuda", arena.backend.device)  # type: ignore[attr-defined]
        backend: Any = copy(arena.backend)
        backend.staging_bytes = 0  # a layer's share is moved by one kernel: no staging memory for each
        self._groups = launch_groups(shape.layers)
        self._first = {group.start: number for number, group in enumerate(self._groups)}
        self._copiers: list[Any] = [
            backend.copier(_kv.select_planes(arena.layout, *shape.span(group)), arena.space.base)
            for group in self._groups
        ]
        self._import: _Transfer | None = None
        self._ended: list[_Ended] = []
        self._storage = torch.cuda.Stream(self._device)

    def _pages(self, device_indices: torch.Tensor) -> torch.Tensor:
        return (device_indices[:: self._shape.page_size] // self._shape.page_size).to(self._device, torch.int64)

    def _table(self, refs: PageRefs) -> torch.Tensor:
        table = torch.empty((2, len(refs)), dtype=torch.int64, pin_memory=True)
        rows = table.numpy()
        rows[0], rows[1] = refs.pages, refs.generations.view(np.int64)
        return table.to(self._device, non_blocking=True)

    def export(self, device_indices: torch.Tensor, chosen: NDArray[np.int64], refs: PageRefs) -> None:
        held = hold(self._arena, refs, _kv.Direction.EXPORT)
        pages = self._pages(device_indices)
        if len(chosen) < len(pages):
            pages = pages[torch.from_numpy(chosen).pin_memory().to(self._device, non_blocking=True)]
        table = self._table(refs)
        copier: Any = self._arena.copier
        addresses = _kv.DeviceTables(pages.data_ptr(), table[0].data_ptr(), table[1].data_ptr(), 0, len(refs), 1)
        stream = torch.cuda.current_stream(self._device)
        config = copier.select(_kv.Direction.EXPORT, len(refs))
        copier.launch(_kv.Direction.EXPORT, addresses, config, stream.cuda_stream, EXPORT_LANE)
        event = torch.cuda.Event()
        event.record(stream)
        held.finish_when(event.query)

    def begin_import(self, device_indices: torch.Tensor, held: list[Hold]) -> None:
        refs = refs_of(held)
        self.settle()
        start = torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(self._device))
        flags = torch.zeros((len(self._groups), len(refs)), dtype=torch.int32, device=self._device)
        pages, table = self._pages(device_indices), self._table(refs)
        self._import = _Transfer(pages, table, flags, tables_of(pages, table, flags), len(refs), held, start)

    def import_layer(self, layer: int) -> None:
        transfer = self._import
        assert transfer is not None, "layers come after begin_import"
        ends = layer == self._groups[-1].stop - 1
        if layer not in self._first and not ends:
            return
        stream = torch.cuda.current_stream(self._device)
        if layer in self._first:
            group = self._first[layer]
            copier, direction = self._copiers[group], _kv.Direction.IMPORT
            config = copier.select(direction, transfer.pages)
            copier.launch(direction, transfer.launches[group], config, stream.cuda_stream, IMPORT_LANE)
        if ends:
            self._finish(transfer, stream)

    def _finish(self, transfer: _Transfer, stream: torch.cuda.Stream) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        for held in transfer.held:
            held.finish_when(event.query)
        matches = torch.empty(1, dtype=torch.int64, pin_memory=True)
        matches.copy_((transfer.flags == _kv.PAGE_MATCHES).all(dim=0).sum().reshape(1), non_blocking=True)
        read = torch.cuda.Event()
        read.record(stream)
        self._ended.append(_Ended(transfer, event, read, matches))
        self._import = None
        self._stats.add("restored_bytes", transfer.pages * self._shape.page_bytes)

    def settle(self) -> None:
        """What the flags of imports said that have ended since."""
        while self._ended and self._ended[0].read.query():
            ended = self._ended.pop(0)
            if int(ended.matches[0]) != ended.transfer.pages:
                _report_late(self._stats, ended.transfer.pages - int(ended.matches[0]))
            self._stats.add("restore_seconds", ended.transfer.start.elapsed_time(ended.end) / 1000)

    def read_page(self, ref: PageRefs) -> torch.Tensor:
        data = torch.empty(self._shape.page_bytes, dtype=torch.uint8, pin_memory=True)
        held = hold(self._arena, ref, _kv.Direction.IMPORT, quiet="wait", wait_s=STORAGE_WAIT_S)
        try:
            source = page_address(self._arena, int(ref.pages[0]))
            _kv.copy_contiguous(data.data_ptr(), source, data.nbytes, self._storage.cuda_stream)
            self._storage.synchronize()
            _check_tag(self._arena, ref)
        finally:
            held.release()
        return data

    def write_page(self, ref: PageRefs, data: torch.Tensor) -> None:
        held = hold(self._arena, ref, _kv.Direction.EXPORT, quiet="wait", wait_s=STORAGE_WAIT_S)
        try:
            staged = data.contiguous().view(torch.uint8).pin_memory()
            tag = torch.from_numpy(ref.generations.view(np.int64)).pin_memory()
            stream = self._storage.cuda_stream
            _kv.copy_contiguous(page_address(self._arena, int(ref.pages[0])), staged.data_ptr(), staged.nbytes, stream)
            _kv.copy_contiguous(_tag_address(self._arena, ref), tag.data_ptr(), 8, stream)
            self._storage.synchronize()
        finally:
            held.release()


def _tag_address(arena: PageArena, ref: PageRefs) -> int:
    slot, within = divmod(int(ref.pages[0]), arena.layout.pages_per_chunk)
    return int(arena.space.base + slot * arena.chunk_bytes + arena.layout.tag_offset + within * 8)


def _check_tag(arena: PageArena, ref: PageRefs) -> None:
    if tags(arena, ref)[0] != ref.generations[0]:
        raise StalePages(np.zeros(1, np.int64), "the page holds other bytes than were written there")


def _report_late(stats: Stats, pages: int) -> None:
    """Tags are checked before a restore is admitted; bytes that change after that are somebody's stray write."""
    logger.error("%d pages changed in the lender's memory while they were read: their requests saw wrong KV", pages)
    stats.add("late_mismatched_pages", pages)

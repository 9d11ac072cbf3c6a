"""How pages travel between device pool and arena: at once on a CPU, layer by layer beside the forward on a GPU."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
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
FIRST_BYTES = 512 << 20  # some 1.5 ms over NVLink: before its first layer, a forward launches for longer
PINNED_COPIES = 2


class PageMover(Protocol):
    """Moves pages of one device pool to and from one arena; called on the stream the copy belongs to."""

    arrivals: Sequence[int]
    """Of the import begun last, for each layer: the last layer that comes by the same launch."""

    def prepare(self, stream: Any, most_pages: int) -> None:
        """Before the first import, which will be on this stream, as all are."""

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


def launch_groups(layers: int, first: int) -> list[range]:
    """The layers that one launch moves, in order: `first`, then twice as many at a time."""
    starts = [0, *range(first, layers, 2 * first)]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], layers], strict=True)]


def launch_plans(layers: int) -> list[list[range]]:
    """Ways to split the layers among launches, the coarsest first."""
    firsts = {layers, -(-layers // 4), min(4, layers), min(2, layers)}
    return [launch_groups(layers, first) for first in sorted(firsts, reverse=True)]


def choose_plan(plans: list[list[range]], layer_bytes: int, most: int = FIRST_BYTES) -> int:
    """Of plans, coarsest first, the first whose first launch moves at most `most` bytes, else the finest.

    The scheduler makes all launches before it can launch the forward, so few are best where the forward's launches
    take longer than the copy; a long copy begins with few layers, so that the forward can begin.
    """
    fits = (number for number, groups in enumerate(plans) if len(groups[0]) * layer_bytes <= most)
    return next(fits, len(plans) - 1)


def arrivals_of(groups: list[range]) -> list[int]:
    """For each layer, the last layer of its launch."""
    return [group.stop - 1 for group in groups for _ in group]


class LoopbackMover:
    """Copies that are done when they return: a CPU has no stream that could order them."""

    def __init__(self, shape: PageShape, arena: PageArena, stats: Stats) -> None:
        self._shape, self._arena, self._stats = shape, arena, stats
        self.arrivals: Sequence[int] = [shape.layers - 1] * shape.layers

    def prepare(self, stream: Any, most_pages: int) -> None:
        """Nothing to keep ready."""

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
    """One import under way; the tensors must outlive its kernels. `plan`: number of its launch plan."""

    plan: int
    tables: _kv.DeviceTables
    kept: tuple[torch.Tensor, ...]
    flags: torch.Tensor
    held: list[Hold]
    start: torch.cuda.Event


class _Ended(NamedTuple):
    transfer: _Transfer
    end: torch.cuda.Event
    flags: torch.Tensor


class CudaMover:
    """One to a dozen kernels on the controller's load stream, each for some layers; one for all on its write stream.

    Tables are made on the host and copied without waiting. Restores overlap the forward: a layer's attention waits for
    the launch that brings that layer's pages only (HiCache's own events). All launches of an import write the same
    flags: what counts is the last one's, which looks at the tags after all bytes were read.
    """

    def __init__(self, shape: PageShape, arena: PageArena, stats: Stats) -> None:
        self._shape, self._arena, self._stats = shape, arena, stats
        self._device = torch.device("cuda", arena.backend.device)  # type: ignore[attr-defined]
        self._plans = launch_plans(shape.layers)
        self._arrivals = [arrivals_of(groups) for groups in self._plans]
        self.arrivals: Sequence[int] = self._arrivals[0]
        backend: Any = copy(arena.backend)
        backend.staging_bytes = 0  # a layer's share is moved by one kernel: no staging memory for each
        self._copiers: list[dict[int, Any]] = [
            {
                group.start: backend.copier(_kv.select_planes(arena.layout, *shape.span(group)), arena.space.base)
                for group in groups
            }
            for groups in self._plans
        ]
        self._import: _Transfer | None = None
        self._ended: list[_Ended] = []
        self._storage = torch.cuda.Stream(self._device)

    def prepare(self, stream: Any, most_pages: int) -> None:
        """Pinned and device memory for tables of any size is taken now and kept by torch's allocators.

        Taken while a request waits, it has cost tens of milliseconds.
        """
        self._arena.tags.reserve()
        sizes = [1 << bits for bits in range(12, (16 * most_pages - 1).bit_length() + 1)]
        kept = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes for _ in range(PINNED_COPIES)]
        with torch.cuda.stream(stream):
            kept += [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        del kept

    def _pages(self, device_indices: torch.Tensor) -> torch.Tensor:
        if self._shape.page_size > 1:
            device_indices = device_indices[:: self._shape.page_size] // self._shape.page_size
        return device_indices.to(self._device, torch.int64).contiguous()

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
        start = torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(self._device))
        flags = torch.zeros(len(refs), dtype=torch.int32, device=self._device)
        pages, table = self._pages(device_indices), self._table(refs)
        arena_pages = table.data_ptr()
        generations = arena_pages + table.stride(0) * table.itemsize
        tables = _kv.DeviceTables(pages.data_ptr(), arena_pages, generations, flags.data_ptr(), len(refs), 1)
        plan = choose_plan(self._plans, len(refs) * self._shape.page_bytes // self._shape.layers)
        self.arrivals = self._arrivals[plan]
        self._import = _Transfer(plan, tables, (pages, table), flags, held, start)

    def import_layer(self, layer: int) -> None:
        transfer = self._import
        assert transfer is not None, "layers come after begin_import"
        copier = self._copiers[transfer.plan].get(layer)
        if copier is not None:
            stream = torch.cuda.current_stream(self._device).cuda_stream
            config = copier.select(_kv.Direction.IMPORT, len(transfer.flags))
            copier.launch(_kv.Direction.IMPORT, transfer.tables, config, stream, IMPORT_LANE)
        if layer == self._shape.layers - 1:
            self._finish(transfer)

    def _finish(self, transfer: _Transfer) -> None:
        flags = torch.empty(len(transfer.flags), dtype=torch.int32, pin_memory=True)
        flags.copy_(transfer.flags, non_blocking=True)
        end = torch.cuda.Event(enable_timing=True)
        end.record(torch.cuda.current_stream(self._device))
        for held in transfer.held:
            held.finish_when(end.query)
        self._ended.append(_Ended(transfer, end, flags))
        self._import = None
        self._stats.add("restored_bytes", len(flags) * self._shape.page_bytes)

    def settle(self) -> None:
        """What the flags of imports said that have ended since."""
        while self._ended and self._ended[0].end.query():
            ended = self._ended.pop(0)
            if stale := int(np.count_nonzero(ended.flags.numpy() != _kv.PAGE_MATCHES)):
                _report_late(self._stats, stale)
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

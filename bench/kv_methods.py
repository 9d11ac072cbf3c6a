"""The ways to move pages that bench.kv_transfer compares; each takes a rig and enqueues a transfer of page tables."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.kv_rig import Rig, Tables
from specgen_engine.kv.native import _kv

MOST_BATCH_ENTRIES = 4_096
TILE_BYTES = 512 * 1024
_pinned_buffers: list[torch.Tensor] = []
Move = Callable[[Tables, int], None]  # tables and a raw stream


class NotHere(Exception):
    """The method can't run here; the message is the row's `skipped`."""


def direction_of(name: str) -> Any:
    return _kv.Direction.EXPORT if name == "push" else _kv.Direction.IMPORT


def config_for(method: str, rig: Rig, direction: str, pages: int, sms: int) -> Any:
    """The launch shape of one of our rows: `auto` as the library chooses, or a kernel by name with its usual shape."""
    layout = rig.arena.layout
    auto = _kv.select_copy_config(layout.slot_bytes, pages * layout.page_bytes, direction_of(direction), sms)
    if method == "static":
        return _kv.CopyConfig(auto.method, auto.sms, auto.warps, auto.stages, auto.stage_bytes)
    if method == "tiled" and auto.method == "bulk":
        tiles = pages * layout.page_bytes // (auto.sms * auto.warps * TILE_BYTES)
        shape = (auto.method, auto.sms, auto.warps, auto.stages, auto.stage_bytes)
        return _kv.CopyConfig(*shape, max(1, min(16, tiles)))
    if method == "wide" and auto.method == "bulk":
        stage = max(layout.slot_bytes, 16384 // layout.slot_bytes * layout.slot_bytes)
        return _kv.CopyConfig("bulk", auto.sms, 4, 3, stage, auto.tiles_per_warp)
    if method == "vector":
        return _kv.CopyConfig("vector", auto.sms, 32, 0, 0)
    if method == "bulk" and auto.method != "bulk":
        return _kv.CopyConfig(
            "bulk", auto.sms, 4, 6, max(layout.slot_bytes, 8192 // layout.slot_bytes * layout.slot_bytes)
        )
    return auto


def ours(rig: Rig, direction: str, config: Any, lane: int) -> Move:
    way = direction_of(direction)
    if not rig.on_gpu:
        return lambda tables, stream: _loopback(rig, way, tables)
    return lambda tables, stream: rig.copier.launch(way, tables.addresses(), config, stream, lane)


def _loopback(rig: Rig, way: Any, tables: Tables) -> None:
    columns = (tables.device_pages.numpy(), tables.arena_pages.numpy(), tables.generations.numpy().view(np.uint64))
    ticket = rig.arena.copier.submit(way, *columns)
    if not rig.arena.copier.wait(ticket, 60_000):
        raise TimeoutError("loopback copy unfinished after 60 s")
    flags = rig.arena.copier.take_flags(ticket)
    if len(flags):
        tables.flags.copy_(torch.from_numpy(flags))


def copy_engine(rig: Rig, direction: str, bytes_: int) -> Move:
    """Contiguous, the ceiling: the pool's first bytes and the arena's."""
    target, source = (rig.base, rig.pool.data_ptr()) if direction == "push" else (rig.pool.data_ptr(), rig.base)
    return lambda tables, stream: _kv.copy_contiguous(target, source, bytes_, stream)


def copy_engines_both_ways(bytes_: int) -> tuple[Move, Move]:
    """(GPU 0 writes to GPU 1, GPU 1 writes to GPU 0), contiguous, each to be issued by the GPU that writes.

    Two copies that one GPU issues, one each way, take turns: 397 GB/s for both together, measured on two H100.
    """
    here, there = (torch.zeros(2 * bytes_, dtype=torch.uint8, device=f"cuda:{index}") for index in range(2))
    there[:16].copy_(here[:16])  # torch enables peer access at the first copy each way
    here[:16].copy_(there[:16])
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)

    def push(tables: Tables, stream: int) -> None:
        _kv.copy_contiguous(there.data_ptr(), here.data_ptr(), bytes_, stream)

    def pull(tables: Tables, stream: int) -> None:
        _kv.copy_contiguous(here.data_ptr() + bytes_, there.data_ptr() + bytes_, bytes_, stream)

    return push, pull


def copy_batch(rig: Rig, direction: str, tables_list: list[Tables]) -> Move:
    """cudaMemcpyBatchAsync, an entry a page and plane; the lists are made beforehand."""
    entries = len(tables_list[0]) * len(rig.planes)
    if entries > MOST_BATCH_ENTRIES:
        raise NotHere(f"{entries} entries: lists of more than {MOST_BATCH_ENTRIES} take longer to enqueue than to copy")
    lists = {id(tables): address_lists(rig, direction, tables, rig.base) for tables in tables_list}
    return lambda tables, stream: _kv.copy_batch(*lists[id(tables)], stream)


def address_lists(rig: Rig, direction: str, tables: Tables, base: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, sources, sizes), uint64, an entry a page and plane, for an arena at `base` laid out as the rig's."""
    at, where = tables.device_pages.cpu().numpy(), tables.arena_pages.cpu().numpy()
    layout, page_first, before = rig.arena.layout, rig.shape.layout == "page_first", 0
    chunk, page = where // layout.pages_per_chunk, where % layout.pages_per_chunk
    device, arena = [], []
    for plane, size in zip(rig.planes, rig.shape.planes, strict=True):
        offset, stride = (before, layout.page_bytes) if page_first else (before * layout.pages_per_chunk, size)
        device.append(plane.data_ptr() + at * size)
        arena.append(base + chunk * rig.chunk_bytes + offset + page * stride)
        before += size
    pool_side, arena_side = (np.concatenate(side).astype(np.uint64) for side in (device, arena))
    sizes = np.repeat(np.asarray(rig.shape.planes, np.uint64), len(at))
    return (arena_side, pool_side, sizes) if direction == "push" else (pool_side, arena_side, sizes)


def torch_index(rig: Rig, direction: str) -> Move:
    """Advanced indexing, a gather and a scatter a plane, on the arena as a tensor of the borrower's device."""
    if rig.on_gpu:
        if importlib.util.find_spec("cupy") is None:
            raise NotHere(
                "cupy isn't installed: torch takes no tensor of peer memory mapped for this device without it"
            )
        import cupy

        memory = cupy.cuda.UnownedMemory(rig.base, rig.arena_bytes, rig, rig.device.index)
        arena = torch.from_dlpack(cupy.ndarray((rig.arena_bytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0)))
        if arena.device != rig.device:
            raise NotHere(f"torch takes the arena for memory of {arena.device}, where it isn't mapped")
    else:
        import ctypes

        arena = torch.frombuffer((ctypes.c_uint8 * rig.arena_bytes).from_address(rig.base), dtype=torch.uint8)
    views = [rig.pages_view(arena, index) for index in range(len(rig.planes))]

    def move(tables: Tables, stream: int) -> None:
        chunk, page = rig._places(tables)
        for plane, view in zip(rig.planes, views, strict=True):
            if direction == "push":
                view[chunk, page] = plane[tables.device_pages]
            else:
                plane[tables.device_pages] = view[chunk, page]

    return move


def host_pinned(rig: Rig, direction: str, bytes_: int) -> Move:
    """The same bytes to pinned host memory, contiguous: the most a tier in host memory could reach."""
    host = _pinned(bytes_)
    ends = (host.data_ptr(), rig.pool.data_ptr()) if direction == "push" else (rig.pool.data_ptr(), host.data_ptr())

    return lambda tables, stream: _kv.copy_contiguous(*ends, bytes_, stream)


def _pinned(bytes_: int) -> torch.Tensor:
    """One buffer for all rows: pinning a GiB takes longer than copying it."""
    if not _pinned_buffers or _pinned_buffers[-1].numel() < bytes_:
        _pinned_buffers[:] = [torch.empty(bytes_, dtype=torch.uint8, pin_memory=True)]
    return _pinned_buffers[-1]


def load_sgl_kernel(library: Path | None) -> None:
    """SGLang's transfer operators, from the installed package or from its shared library. Raises NotHere."""
    try:
        if library is not None:
            torch.ops.load_library(str(library))
        else:
            import sgl_kernel  # noqa: F401
        _ = torch.ops.sgl_kernel.transfer_kv_all_layer_mla
    except Exception as error:  # an import of foreign binaries can fail in any way
        raise NotHere(f"sgl_kernel isn't usable here: {str(error).splitlines()[0]}") from None


def sgl_kvcacheio(rig: Rig, direction: str, quota: int, library: Path | None) -> Move:
    """SGLang's HiCache kernel for all layers, layer-first on both sides, the arena as one run of pages."""
    if len(set(rig.shape.planes)) != 1:
        raise NotHere("the kernel moves planes of one size")
    load_sgl_kernel(library)
    size = rig.shape.planes[0]
    pool = torch.tensor([plane.data_ptr() for plane in rig.planes], dtype=torch.uint64, device=rig.device)
    arena = torch.tensor(
        [rig.base + i * rig.pages * size for i in range(len(rig.planes))], dtype=torch.uint64, device=rig.device
    )
    source, target = (pool, arena) if direction == "push" else (arena, pool)

    def move(tables: Tables, stream: int) -> None:
        ends = (
            (tables.device_pages, tables.arena_pages)
            if direction == "push"
            else (tables.arena_pages, tables.device_pages)
        )
        torch.ops.sgl_kernel.transfer_kv_all_layer_mla.default(source, target, *ends, size, len(rig.planes), quota, 32)

    return move


def verify_sgl(rig: Rig, direction: str, move: Move, tables: Tables) -> bool:
    """As `Rig.verify_*`, for the arena as one layer-first run of pages."""
    rig.pool.add_(1)
    arena, pool = rig.snapshot(), rig.pool.clone()
    flat = [
        arena[i * rig.pages * s : (i + 1) * rig.pages * s].view(rig.pages, s) for i, s in enumerate(rig.shape.planes)
    ]
    for view, plane in zip(flat, rig._split(pool), strict=True):
        if direction == "push":
            view[tables.arena_pages] = plane[tables.device_pages]
        else:
            plane[tables.device_pages] = view[tables.arena_pages]
    move(tables, torch.cuda.current_stream().cuda_stream)
    rig.synchronize()
    return torch.equal(rig.snapshot(), arena) if direction == "push" else torch.equal(rig.pool, pool)

"""The stage of bench.kv_transfer: a lender process, a borrowed arena, a device pool, random page tables, and the proof
that a method moved exactly the bytes it should."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.kv_shapes import MIB, Shape
from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import Backend, KvError
from specgen_engine.kv.borrower import Link
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv

ROOT = Path(__file__).resolve().parent.parent
# Arena and pool hold so many times the largest batch: random pages lie scattered; for copies both ways, two batches.
SPARE, SPARE_BOTH_WAYS = 1.25, 2.05


class Tables(NamedTuple):
    """Page tables on the device: int64 [n] each (generations are uint64 bits), flags int32 [n]."""

    device_pages: torch.Tensor
    arena_pages: torch.Tensor
    generations: torch.Tensor
    flags: torch.Tensor

    def __len__(self) -> int:
        return self.device_pages.numel()

    def addresses(self) -> Any:
        pages, arena, generations, flags = (tensor.data_ptr() for tensor in self)
        return _kv.DeviceTables(pages, arena, generations, flags, pages=len(self), index_stride=1)


class LenderProcess:
    """`python -m specgen_engine.kv` on a device, spoken to by lines."""

    def __init__(self, backend: str, device: int, chunk_mib: int, chunks: int, lease_s: float = 60.0) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="specgen-kv-")
        command = [
            sys.executable,
            "-m",
            "specgen_engine.kv",
            "--directory",
            f"{self._directory.name}/s",
            "--backend",
            backend,
        ]
        command += [
            "--device",
            str(device),
            "--chunk-mib",
            str(chunk_mib),
            "--chunks",
            str(chunks),
            "--lease-s",
            str(lease_s),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.path = Path(self._read()["ready"])

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(timeout=30)

    def close(self) -> None:
        if self.process.poll() is None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait(timeout=30)
        self._directory.cleanup()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise KvError(f"the lender process ended with status {self.process.wait(timeout=10)}: see its error above")
        return json.loads(line)

    def __enter__(self) -> LenderProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Rig:
    """One shape's buffers on both sides.

    Args:
        device: `cuda:0`, or `cpu` for the loopback.
        lender: where the chunks come from.
        batch_bytes: the largest batch the rig will move.
        spare: pages on each side, in largest batches.
    """

    def __init__(
        self,
        device: str,
        lender: LenderProcess,
        chunk_mib: int,
        shape: Shape,
        batch_bytes: int,
        seed: int,
        segment_bytes: int = 8192,
        spare: float = SPARE,
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.chunk_bytes = chunk_mib * MIB
        backend: Backend = CudaBackend(self.device.index) if self.on_gpu else LoopbackBackend()
        batch_pages = max(1, batch_bytes // shape.page_bytes)
        self.pages = max(int(batch_pages * spare), batch_pages + 8)
        self.pool = torch.randint(0, 256, (self.pages * shape.page_bytes,), dtype=torch.uint8, device=self.device)
        self.planes = self._split(self.pool)
        layout = _kv.ArenaLayout.PAGE_FIRST if shape.layout == "page_first" else _kv.ArenaLayout.LAYER_FIRST
        slots = -(-self.pages // _kv.pages_in_chunk(self.chunk_bytes, shape.page_bytes))
        rows = [_kv.Plane(plane.data_ptr(), plane.stride(0), plane.shape[1]) for plane in self.planes]
        self.arena = PageArena(backend, rows, layout, slots, self.chunk_bytes, segment_bytes)
        self.link = Link(self.arena, lender.path, f"bench-{shape.name}-{time.monotonic_ns()}", timeout_s=30)
        while (missing := slots - self.link.chunks) > 0:
            self.link.grow(missing)
        self.refs = self.arena.allocate(self.pages)
        self._random = np.random.default_rng(seed)
        self.arena_bytes = slots * self.chunk_bytes
        self._elsewhere: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def copier(self) -> Any:
        """The arena's copier with what its own kind offers beyond the contract (`launch` on a GPU)."""
        return self.arena.copier

    @property
    def base(self) -> int:
        return self.arena.space.base if self._elsewhere is None else self._elsewhere

    @contextmanager
    def looking_at(self, base: int) -> Iterator[None]:
        """Snapshots, and so verification, of other memory that is laid out as the arena."""
        self._elsewhere = base
        try:
            yield
        finally:
            self._elsewhere = None

    def close(self) -> None:
        self.link.close()
        del self.pool, self.planes

    def tables(self, pages: int, part: int = 0, parts: int = 1) -> Tables:
        """Random pages to random pages, none twice; `part` of `parts` disjoint sets."""
        share = self.pages // parts
        at = self._random.permutation(share)[:pages] + part * share
        where = self._random.permutation(share)[:pages] + part * share
        generations = self.refs.generations[where].view(np.int64)
        at_device, at_arena, tags = [
            torch.from_numpy(column).to(self.device) for column in (at, self.refs.pages[where], generations)
        ]
        return Tables(at_device, at_arena, tags, torch.zeros(pages, dtype=torch.int32, device=self.device))

    def run_tables(self, pages: int) -> Tables:
        """Random pool pages to arena pages side by side, as an arena that isn't worn gives them out."""
        scattered, side_by_side = self.tables(pages), self.sequential_tables(pages)
        return Tables(scattered.device_pages, *side_by_side[1:])

    def sequential_tables(self, pages: int) -> Tables:
        """The first pages to the first pages, in order: what scatter costs."""
        at = np.arange(pages)
        where = np.argsort(self.refs.pages)[:pages]
        columns = (at, self.refs.pages[where], self.refs.generations[where].view(np.int64))
        at_device, at_arena, tags = [torch.from_numpy(column).to(self.device) for column in columns]
        return Tables(at_device, at_arena, tags, torch.zeros(pages, dtype=torch.int32, device=self.device))

    def snapshot(self) -> torch.Tensor:
        """A copy of the whole arena on the borrower's device."""
        copy = torch.empty(self.arena_bytes, dtype=torch.uint8, device=self.device)
        if self.on_gpu:
            _kv.copy_contiguous(copy.data_ptr(), self.base, self.arena_bytes, torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
        else:
            ctypes.memmove(copy.data_ptr(), self.base, self.arena_bytes)
        return copy

    def pages_view(self, arena: torch.Tensor, plane: int) -> torch.Tensor:
        """An arena's bytes as [chunk, page in chunk, byte] of one plane."""
        layout, sizes = self.arena.layout, self.shape.planes
        before = sum(sizes[:plane])
        page_first = self.shape.layout == "page_first"
        offset = before if page_first else before * layout.pages_per_chunk
        stride = layout.page_bytes if page_first else sizes[plane]
        chunks = arena.numel() // self.chunk_bytes
        return arena.as_strided((chunks, layout.pages_per_chunk, sizes[plane]), (self.chunk_bytes, stride, 1), offset)

    def tags_view(self, arena: torch.Tensor) -> torch.Tensor:
        """An arena's generation tags as int64 [chunk, page in chunk]."""
        layout = self.arena.layout
        words = arena.view(torch.int64)
        return words.as_strided(
            (arena.numel() // self.chunk_bytes, layout.pages_per_chunk),
            (self.chunk_bytes // 8, 1),
            layout.tag_offset // 8,
        )

    def verify_push(self, push: Callable[[Tables], None], tables: Tables, tagged: bool) -> bool:
        """Whether `push` changed the arena's listed pages into the pool's, their tags if `tagged`, and nothing else."""
        self.pool.add_(1)
        expected = self.snapshot()
        self.scatter(expected, tables, tagged)
        push(tables)
        self.synchronize()
        return torch.equal(self.snapshot(), expected)

    def verify_pull(self, pull: Callable[[Tables], None], tables: Tables, tagged: bool) -> bool:
        """Whether `pull` changed the pool's listed pages into the arena's and nothing else, every tag found right."""
        self.pool.add_(1)
        arena, expected = self.snapshot(), self.pool.clone()
        chunk, page = self._places(tables)
        for index, plane in enumerate(self._split(expected)):
            plane[tables.device_pages] = self.pages_view(arena, index)[chunk, page]
        tables.flags.zero_()
        pull(tables)
        self.synchronize()
        flags_right = not tagged or bool((tables.flags == _kv.PAGE_MATCHES).all())
        return flags_right and torch.equal(self.pool, expected)

    def scatter(self, arena: torch.Tensor, tables: Tables, tagged: bool) -> None:
        """What a push leaves in a copy of the arena."""
        chunk, page = self._places(tables)
        for index, plane in enumerate(self.planes):
            self.pages_view(arena, index)[chunk, page] = plane[tables.device_pages]
        if tagged:
            self.tags_view(arena)[chunk, page] = tables.generations

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _places(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        per_chunk = self.arena.layout.pages_per_chunk
        return tables.arena_pages // per_chunk, tables.arena_pages % per_chunk

    def _split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        planes, at = [], 0
        for size in self.shape.planes:
            planes.append(flat[at : at + self.pages * size].view(self.pages, size))
            at += self.pages * size
        return planes

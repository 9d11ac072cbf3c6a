"""The start-up probe: pages go out and come back, every byte is compared, both directions are timed."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import ArenaFull, KvError
from specgen_engine.tier.base import PageShape, TierError

PROBE_BYTES = 64 << 20
SEED = 20


class Report(NamedTuple):
    """`out_gbps` to the lender, `in_gbps` back, in 1e9 bytes a second."""

    pages: int
    out_gbps: float
    in_gbps: float

    def __str__(self) -> str:
        return f"probe: {self.pages} pages verified, {self.out_gbps:.1f} GB/s out, {self.in_gbps:.1f} GB/s in"


def buffers_of(device_pool: Any) -> list[torch.Tensor]:
    """The pool's tensors in the order of its planes."""
    if hasattr(device_pool, "tier_buffers"):
        return list(device_pool.tier_buffers)
    if hasattr(device_pool, "k_buffer"):
        return [one for pair in zip(device_pool.k_buffer, device_pool.v_buffer, strict=True) for one in pair]
    if hasattr(device_pool, "index_k_with_scale_buffer"):
        layers = zip(device_pool.kv_buffer, device_pool.index_k_with_scale_buffer, strict=True)
        return [one for pair in layers for one in pair]
    return list(device_pool.kv_buffer)


def probe(device_pool: Any, shape: PageShape, arena: PageArena, draft: Any = None) -> Report:
    """Before the first request, while the pool's pages are nobody's; `draft`: the pool whose planes come after its.

    Raises TierError when bytes come back changed, or nothing can be moved.
    """
    tensors = buffers_of(device_pool) + (buffers_of(draft) if draft is not None else [])
    buffers = [buffer.view(torch.uint8).reshape(-1) for buffer in tensors]
    count = min(PROBE_BYTES // shape.page_bytes + 1, device_pool.size // shape.page_size // 2, arena.counts().free)
    pages = np.arange(1, count + 1)
    rows = [
        buffer[plane.bytes : (count + 1) * plane.bytes] for buffer, plane in zip(buffers, shape.planes, strict=True)
    ]
    generator = torch.Generator(device=rows[0].device).manual_seed(SEED)
    try:
        refs = arena.allocate(count)
        seconds = []
        for row in rows:
            row.random_(0, 256, generator=generator)
        wanted = [_digest(row) for row in rows]
        for move in (arena.export, arena.import_):
            _settle(rows[0])
            start = time.perf_counter()
            move(pages, refs).result()
            seconds.append(time.perf_counter() - start)
            if move == arena.export:
                for row in rows:
                    row.zero_()
        _settle(rows[0])
        wrong = sum(_digest(row) != digest for row, digest in zip(rows, wanted, strict=True))
        arena.release(refs)
    except (ArenaFull, KvError) as error:
        raise TierError(f"--specgen-kv: the start-up probe could not move {count} pages: {error}") from None
    finally:
        for row in rows:
            row.zero_()
        _settle(rows[0])
    if wrong:
        raise TierError(f"--specgen-kv: the start-up probe got {wrong} of {len(rows)} buffers back with other bytes")
    size = count * shape.page_bytes / 1e9
    return Report(count, size / seconds[0], size / seconds[1])


def _digest(row: torch.Tensor) -> tuple[int, int]:
    """Sensitive to bytes and to their order."""
    words = row.view(torch.int64) if row.numel() % 8 == 0 else row.to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device)
    return int(words.sum()), int((words * places).sum())


def _settle(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)

"""SGLang's own device pools, on a CPU or a GPU, over an arena whose lender lives in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from specgen_engine import versions
from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import Backend
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv
from specgen_engine.serving.cpu import STUB
from specgen_engine.tier.base import page_shape
from specgen_engine.tier.lenders import Lenders
from specgen_engine.tier.metrics import Stats

if refused := versions.tier_refusal(versions.current()):
    pytest.skip(refused, allow_module_level=True)
if not torch.cuda.is_available():  # as SGLang's CPU engine is started: read when SGLang is imported
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    sys.path.insert(0, str(STUB))

CHUNK = 1 << 20
FP8 = torch.float8_e4m3fn


def device_pool(kind: str, page_size: int, dtype: torch.dtype, device: str = "cpu", tokens: int = 512) -> Any:
    """Three layers; 2 heads of 64 (MHA) or a latent of 512 + 64 (MLA)."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    common: dict[str, Any] = {
        "size": tokens, "page_size": page_size, "dtype": dtype, "layer_num": 3, "device": device,
        "enable_memory_saver": False,
    }  # fmt: skip
    if kind == "mha":
        return MHATokenToKVPool(head_num=2, head_dim=64, **common)
    return MLATokenToKVPool(kv_lora_rank=512, qk_rope_head_dim=64, **common)


def buffers(pool: Any) -> list[torch.Tensor]:
    from specgen_engine.tier.probe import buffers_of

    return [buffer.view(torch.uint8) for buffer in buffers_of(pool)]


def fill(pool: Any, seed: int) -> list[torch.Tensor]:
    """Random bytes in every buffer; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    for buffer in buffers(pool):
        buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator, dtype=torch.uint8))
    return [buffer.clone() for buffer in buffers(pool)]


def token_indices(pages: list[int], page_size: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * page_size, (page + 1) * page_size) for page in pages])


@dataclass
class Tier:
    """A pool in an arena with its lenders, and the device pool that it serves."""

    device: Any
    pool: Any
    arena: PageArena
    lenders: Lenders
    own: list[Lender]

    def write(self, device_pages: list[int]) -> torch.Tensor:
        """Export device pages; returns their logical indices."""
        size = self.pool.page_size
        indices = self.pool.alloc(len(device_pages) * size)
        assert indices is not None
        on_device = token_indices(device_pages, size).to(self.device.device)
        self.pool.backup_from_device_all_layer(self.device, indices, on_device, "kernel")
        self.settle()
        return indices

    def read(self, indices: torch.Tensor, device_pages: list[int]) -> int:
        """Restore what can be read of logical pages into device pages; returns how many pages came."""
        size = self.pool.page_size
        restore = self.pool.begin_restore(indices)
        if restore.held is None:
            return 0
        self.pool.await_start(restore.held)
        on_device = token_indices(device_pages[: restore.pages], size).to(self.device.device)
        for layer in range(self.pool.layer_num):
            self.pool.load_to_device_per_layer(self.device, indices[: restore.pages * size], on_device, layer, "kernel")
        self.settle()
        return int(restore.pages)

    def settle(self) -> None:
        if str(self.device.device).startswith("cuda"):
            torch.cuda.synchronize()


class Setting(NamedTuple):
    """A TierRadixCache and the tier below it."""

    cache: Any
    tier: Tier

    @property
    def allocator(self) -> Any:
        return self.cache.token_to_kv_pool_allocator

    def accounted(self) -> int:
        """Tokens of the device that are free, evictable or protected: all of them, where none is leaked."""
        return int(self.allocator.available_size() + self.cache.evictable_size() + self.cache.protected_size())


@contextmanager
def tier(
    folder: Path,
    kind: str,
    page_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    chunks: tuple[int, ...] = (4, 4),
    chunk_bytes: int = CHUNK,
    tokens: int = 512,
) -> Iterator[Tier]:
    """One lender an entry of `chunks`."""
    from specgen_engine.tier.movers import CudaMover, LoopbackMover
    from specgen_engine.tier.pool import MHAArenaPool, MLAArenaPool

    pool_on_device = device_pool(kind, page_size, dtype, device, tokens)
    shape = page_shape(pool_on_device, page_size)
    cuda = device.startswith("cuda")
    lend: Backend = CudaBackend(1) if cuda else LoopbackBackend()
    chunk = 2 << 20 if cuda else chunk_bytes
    own = [Lender(folder, f"lender-{i}", lend, chunk, count) for i, count in enumerate(chunks)]
    arena = PageArena(CudaBackend(0) if cuda else lend, shape.planes, _kv.ArenaLayout.PAGE_FIRST, 32, chunk)
    stats = Stats()
    lenders = Lenders(arena, folder, "test", 1, 32, stats)
    assert lenders.look() == sum(chunks)
    mover = CudaMover(shape, arena, stats) if cuda else LoopbackMover(shape, arena, stats)
    class_ = MHAArenaPool if kind == "mha" else MLAArenaPool
    pool = class_(pool_on_device, shape, arena, mover, 32 * arena.layout.pages_per_chunk, stats)
    pool.limit = pool.capacity()
    lenders._move = pool.move
    try:
        yield Tier(pool_on_device, pool, arena, lenders, own)
    finally:
        lenders.close()
        for lender in own:
            lender.close()


def radix_cache(one: Tier, group: Any) -> Any:
    """A TierRadixCache over a tier, with SGLang's own allocators."""

    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from bench.kv_tier_admission import hicache_arguments
    from specgen_engine.tier.cache import TierRadixCache

    pool, size = one.device, one.pool.page_size
    common: dict[str, Any] = {"dtype": pool.dtype, "device": "cpu", "kvcache": pool, "need_sort": False}
    if size == 1:
        allocator = TokenToKVPoolAllocator(pool.size, **common)
    else:
        allocator = PagedTokenToKVPoolAllocator(pool.size, size, **common)
    params = CacheInitParams(False, None, allocator, size, tp_cache_group=group)
    cache = TierRadixCache(params, hicache_arguments(), lambda *_a, **_k: one.pool)
    cache.lenders = one.lenders
    return cache

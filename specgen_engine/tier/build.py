"""Putting the tier together in a scheduler: arena, lenders, probe, pool, radix cache. All ranks do the same steps."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specgen_engine.config import KvConfig
from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import Backend, KvError
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv
from specgen_engine.tier import dsa
from specgen_engine.tier.base import PageShape, TierError, page_shape
from specgen_engine.tier.cache import TierRadixCache
from specgen_engine.tier.lenders import Lenders
from specgen_engine.tier.metrics import Stats
from specgen_engine.tier.movers import CudaMover, LoopbackMover, PageMover
from specgen_engine.tier.pool import ArenaPool, MHAArenaPool, MLAArenaPool
from specgen_engine.tier.probe import probe

logger = logging.getLogger(__name__)

MAX_CHUNKS = 4096  # address space that is set aside: 256 GiB in chunks of 64 MiB
FIRST_LOOK_S = 15.0

dsa.register()


def build_cache(ctx: Any, kv: KvConfig, original: Callable[[Any], Any]) -> Any:
    """The radix cache over borrowed memory, probed.

    Raises TierError, on every rank alike, when the pool does not fit or a rank can borrow nothing and there is no
    fallback to host.
    """
    device_pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    shape = page_shape(device_pool, ctx.params.page_size)
    stats = Stats(export=bool(ctx.params.enable_metrics), rank=ctx.tp_rank)
    backend, arena = make_arena(device_pool, shape, kv)
    lender = own_lender(kv, backend, ctx.tp_rank) if kv.tier == "loopback" and kv.directory is None else None
    directory = lender.path.parent if lender is not None else kv.socket_directory
    share = 1 if lender is not None else ctx.tp_size
    lenders = Lenders(arena, directory, f"{os.getppid()}-tp{ctx.tp_rank}", share, kv.max_chunks or MAX_CHUNKS, stats)
    chunks = _least(_borrow(lenders), ctx.params.tp_cache_group)
    if chunks == 0:
        return _without_lenders(ctx, kv, original, lenders)
    mover: PageMover = LoopbackMover(shape, arena, stats) if kv.tier == "loopback" else CudaMover(shape, arena, stats)
    report = probe(device_pool, shape, arena)
    logger.info("remote KV tier (%s): %d chunks from %s; %s", kv.tier, chunks, ", ".join(lenders.alive), report)
    logical = (chunks if lender is not None else min(MAX_CHUNKS, 2 * chunks + 16)) * arena.layout.pages_per_chunk
    kind = MLAArenaPool if shape.planes_per_layer == 1 else MHAArenaPool
    pool = kind(device_pool, shape, arena, mover, logical, stats)

    def make_pool(*_args: Any, **_kwargs: Any) -> ArenaPool:
        return pool

    with dsa.attached(pool):
        cache = TierRadixCache(ctx.params, ctx.server_args, make_pool)
    cache.lenders, cache.own_lender = lenders, lender
    lenders.watch(pool.move)
    ctx.tp_worker.register_hicache_layer_transfer_counter(cache.cache_controller.layer_done_counter)
    return cache


def make_arena(device_pool: Any, shape: PageShape, kv: KvConfig) -> tuple[Backend, PageArena]:
    """Raises TierError when a page does not fit a chunk, or the device can't be used."""
    try:
        backend: Backend
        if kv.tier == "loopback":
            backend = LoopbackBackend()
        else:
            backend = CudaBackend(torch.cuda.current_device(), sm_budget=kv.sms)
        return backend, PageArena(backend, shape.planes, _kv.ArenaLayout.PAGE_FIRST, MAX_CHUNKS, kv.chunk_mib << 20)
    except (KvError, ValueError, RuntimeError) as error:
        raise TierError(
            f"--specgen-kv {kv.tier}, --specgen-kv-chunk-mib {kv.chunk_mib}, pages of {shape.page_bytes} bytes "
            f"({shape.page_size} tokens): {error}"
        ) from None


def own_lender(kv: KvConfig, backend: Backend, rank: int) -> Lender:
    """A lender inside this process, for loopback without a directory."""
    folder = Path(tempfile.mkdtemp(prefix="specgen-kv-"))
    return Lender(folder, f"own-{rank}", backend, kv.chunk_mib << 20, kv.max_chunks or 16)


def describe(scheduler: Any) -> dict[str, Any] | None:
    """Counts and recounted books of a scheduler's tier; None without one."""
    cache = scheduler.tree_cache
    if not isinstance(cache, TierRadixCache):
        return None
    state: dict[str, Any] = {"counts": dict(cache.stats.counts), "lenders": cache.lenders.alive}
    try:
        state["pages"] = cache.pool.check_integrity()
        state["integrity"] = "ok"
    except KvError as error:
        state["integrity"] = str(error)
    allocator = cache.token_to_kv_pool_allocator
    state["device"] = {
        "free": int(allocator.available_size()),
        "evictable": int(cache.evictable_size()),
        "protected": int(cache.protected_size()),
        "total": int(scheduler.max_total_num_tokens),
    }
    return state


def _borrow(lenders: Lenders) -> int:
    """Lenders of other ranks may be busy with their own claims: look again for a while."""
    end = time.monotonic() + FIRST_LOOK_S
    while lenders.look() == 0 and time.monotonic() < end and lenders.alive:
        time.sleep(0.2)
    return lenders.chunks


def _least(value: int, group: Any) -> int:
    tensor = torch.tensor([value], dtype=torch.int64)
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=group)
    return int(tensor[0])


def _without_lenders(ctx: Any, kv: KvConfig, original: Callable[[Any], Any], lenders: Lenders) -> Any:
    reasons = "; ".join(f"{name}: {why}" for name, why in lenders.refusals.items()) or "no lender answered"
    lenders.close()
    if kv.fallback == "host":
        logger.warning("--specgen-kv %s: a rank could borrow nothing (%s): falling back to host", kv.tier, reasons)
        return original(ctx)
    raise TierError(f"--specgen-kv {kv.tier}: a rank could borrow nothing from {lenders.directory} ({reasons})")

"""Putting the tier together in a scheduler: arena, lenders, probe, pool, radix cache. All ranks do the same steps."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specgen_engine.config import KvConfig
from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import Backend, KvError
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv
from specgen_engine.tier import dsa, dsv4
from specgen_engine.tier.base import PageShape, TierError, page_shape
from specgen_engine.tier.cache import TierRadixCache
from specgen_engine.tier.drafts import kept_beside
from specgen_engine.tier.lenders import Lenders
from specgen_engine.tier.metrics import Stats
from specgen_engine.tier.movers import CudaMover, LoopbackMover, PageMover
from specgen_engine.tier.pool import ArenaPool, MHAArenaPool, MLAArenaPool, PartArenaPool
from specgen_engine.tier.probe import probe
from specgen_engine.tier.unified import Part, Parts, UnifiedTierCache, substituted

logger = logging.getLogger(__name__)

MAX_CHUNKS = 4096  # address space that is set aside: 256 GiB in chunks of 64 MiB
FIRST_LOOK_S = 15.0

dsa.register()


class Borrowed(NamedTuple):
    """An arena with its leases. `chunks`: what the rank that borrowed least has; `owned`: from this process itself."""

    arena: PageArena
    lenders: Lenders
    chunks: int
    owned: bool


def build_cache(ctx: Any, kv: KvConfig, original: Callable[[Any], Any]) -> Any:
    """The radix cache over borrowed memory, probed.

    Raises TierError, on every rank alike, when the pool does not fit or a rank can borrow nothing and there is no
    fallback to host.
    """
    device_pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    stats = Stats(export=bool(ctx.params.enable_metrics), rank=ctx.tp_rank)
    if dsv4.is_dsv4(device_pool):
        return _build_unified(ctx, kv, original, device_pool, stats)
    shape = page_shape(device_pool, ctx.params.page_size)
    kind = MLAArenaPool if shape.planes_per_layer == 1 else MHAArenaPool
    shape, draft, draft_layers = kept_beside(shape, device_pool, ctx.tp_worker)
    backend, arena = make_arena(device_pool, shape, kv)
    lender = own_lender(kv, backend, ctx.tp_rank) if kv.tier == "loopback" and kv.directory is None else None
    one = _borrow(ctx, kv, arena, lender, stats)
    if one.chunks == 0:
        return _without_lenders(ctx, kv, original, [one.lenders])
    pool = _make_pool(kind, device_pool, shape, one, kv, stats, draft)

    def make_pool(*_args: Any, **_kwargs: Any) -> ArenaPool:
        return pool

    with dsa.attached(pool):
        cache = TierRadixCache(ctx.params, ctx.server_args, make_pool)
    cache.all_lenders, cache.own_lender, cache.draft_layers = [one.lenders], lender, draft_layers
    _write_behind_forwards(cache, ctx.tp_worker)
    one.lenders.watch(pool.move)
    ctx.tp_worker.register_hicache_layer_transfer_counter(cache.cache_controller.layer_done_counter)
    return cache


def _build_unified(ctx: Any, kv: KvConfig, original: Callable[[Any], Any], device_pool: Any, stats: Stats) -> Any:
    """DeepSeek-V4: SGLang makes the radix cache as it would, of our class, with an arena for each index space."""
    if ctx.server_args.hicache_storage_backend is not None:
        raise TierError(
            f"--hicache-storage-backend {ctx.server_args.hicache_storage_backend} with {dsv4.POOL}: files hold pages "
            "of each of its buffers, and the remote KV tier moves them together: leave it out"
        )
    size = ctx.params.token_to_kv_pool_allocator.size_full
    tokens, window = dsv4.spaces_of(device_pool, ctx.params.page_size, size)
    window, draft_layers = dsv4.window_with_draft(window, device_pool, ctx.tp_worker, ctx.params.page_size)
    spaces = tokens, window
    weights = [space.shape.page_bytes * (space.size // space.shape.page_size) for space in spaces]
    arenas = [make_arena(space, space.shape, kv) for space in spaces]
    lender = own_lender(kv, arenas[0][0], ctx.tp_rank) if kv.tier == "loopback" and kv.directory is None else None
    borrowed = [
        _borrow(ctx, kv, arena, lender, stats, space.name, weight / sum(weights))
        for space, (_, arena), weight in zip(spaces, arenas, weights, strict=True)
    ]
    if min(one.chunks for one in borrowed) == 0:
        return _without_lenders(ctx, kv, original, [one.lenders for one in borrowed])
    pools = [
        _make_pool(PartArenaPool, space, space.shape, one, kv, stats)
        for space, one in zip(spaces, borrowed, strict=True)
    ]
    parts = Parts(*(Part(space, pool) for space, pool in zip(spaces, pools, strict=True)))
    with substituted(lambda params: UnifiedTierCache(params, parts), parts):
        cache = original(ctx)
    if not isinstance(cache, UnifiedTierCache):
        raise TierError(f"--specgen-kv: SGLang made a {type(cache).__name__} for {dsv4.POOL}: use host or off")
    cache.all_lenders, cache.own_lender = [one.lenders for one in borrowed], lender
    cache.draft_layers = draft_layers
    _write_behind_forwards(cache, ctx.tp_worker)
    for one, pool in zip(borrowed, pools, strict=True):
        one.lenders.watch(pool.move)
    return cache


def _write_behind_forwards(cache: Any, worker: Any) -> None:
    cache.cache_controller.forward_stream = worker.model_runner.forward_stream


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
    if not isinstance(cache, TierRadixCache | UnifiedTierCache):
        return None
    alive = sorted({name for lenders in cache.all_lenders for name in lenders.alive})
    state: dict[str, Any] = {"counts": dict(cache.stats.counts), "lenders": alive, "draft_layers": cache.draft_layers}
    unified = isinstance(cache, UnifiedTierCache)
    pools = (
        {"pages": cache.parts.tokens.pool, "window_pages": cache.parts.window.pool}
        if unified
        else {"pages": cache.pool}
    )
    try:
        for name, pool in pools.items():
            state[name] = pool.check_integrity()
        state["integrity"] = "ok"
    except KvError as error:
        state["integrity"] = str(error)
    allocator = cache.token_to_kv_pool_allocator
    state["device"] = {
        "free": int(allocator.full_available_size() if unified else allocator.available_size()),
        "evictable": int(cache.evictable_size()),
        "protected": int(cache.protected_size()),
        "total": int(scheduler.max_total_num_tokens),
    }
    if unified:
        state["window_device"] = {
            "free": int(allocator.swa_available_size()),
            "evictable": int(cache.swa_evictable_size()),
            "protected": int(cache.swa_protected_size()),
            "total": int(allocator.size_swa),
        }
    return state


def _borrow(
    ctx: Any, kv: KvConfig, arena: PageArena, lender: Lender | None, stats: Stats, space: str = "", fraction: float = 1
) -> Borrowed:
    """`fraction`: what this index space gets of all that the rank may borrow.

    Lenders of other ranks may be busy with their own claims: look again for a while.
    """
    directory = lender.path.parent if lender is not None else kv.socket_directory
    share = (1 if lender is not None else ctx.tp_size) / fraction
    name = f"{os.getppid()}-tp{ctx.tp_rank}" + (f"-{space}" if space else "")
    most = max(1, int((kv.max_chunks or MAX_CHUNKS) * fraction))
    lenders = Lenders(arena, directory, name, share, most, stats)
    end = time.monotonic() + FIRST_LOOK_S
    while lenders.look() == 0 and time.monotonic() < end and lenders.alive:
        time.sleep(0.2)
    return Borrowed(arena, lenders, _least(lenders.chunks, ctx.params.tp_cache_group), lender is not None)


def _make_pool(
    kind: type[ArenaPool], device_pool: Any, shape: PageShape, one: Borrowed, kv: KvConfig, stats: Stats,
    draft: Any = None,
) -> ArenaPool:  # fmt: skip
    """A pool over a borrowed arena, after a probe of it. Raises TierError when bytes come back changed."""
    arena = one.arena
    mover: PageMover = LoopbackMover(shape, arena, stats) if kv.tier == "loopback" else CudaMover(shape, arena, stats)
    report = probe(device_pool, shape, arena, draft)
    name = f"{kv.tier}, {device_pool.name}" if isinstance(device_pool, dsv4.Space) else kv.tier
    logger.info("remote KV tier (%s): %d chunks from %s; %s", name, one.chunks, ", ".join(one.lenders.alive), report)
    chunks = one.chunks if one.owned else min(MAX_CHUNKS, 2 * one.chunks + 16)
    return kind(device_pool, shape, arena, mover, chunks * arena.layout.pages_per_chunk, stats)


def _least(value: int, group: Any) -> int:
    tensor = torch.tensor([value], dtype=torch.int64)
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=group)
    return int(tensor[0])


def _without_lenders(ctx: Any, kv: KvConfig, original: Callable[[Any], Any], all_lenders: list[Lenders]) -> Any:
    refusals = {name: why for lenders in all_lenders for name, why in lenders.refusals.items()}
    reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items()) or "no lender answered"
    for lenders in all_lenders:
        lenders.close()
    if kv.fallback == "host":
        logger.warning("--specgen-kv %s: a rank could borrow nothing (%s): falling back to host", kv.tier, reasons)
        return original(ctx)
    needed = f", and {dsv4.POOL} needs a chunk for each of its index spaces" if len(all_lenders) > 1 else ""
    raise TierError(
        f"--specgen-kv {kv.tier}: a rank could borrow nothing from {all_lenders[0].directory} ({reasons}){needed}"
    )

"""The scheduler's own part of a restore on a CPU: holding pages, comparing tags, SGLang's books; no copy, no launches.

    python -m bench.kv_tier_admission [--rounds 7]

A TierRadixCache over shared memory, page size 1, 456 pages to a chunk as Qwen3-8B has them in 64 MiB. A prefix of
64,000 tokens evicts all others; then one prefix is restored alone, or 32 in one admission round. Prints one line of
JSON: medians in ms, [all of the admission, of it holding pages and comparing tags], and how often tags were read.
To compare two versions, run it by turns in a checkout of each, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv
from specgen_engine.serving.cpu import STUB

POOL, LONGEST, CHUNK_BYTES, CHUNKS = 68_000, 64_000, 704_512, 420
ALONE = (32_000, 16_000, 8_000, 2_000)
CROWD, CROWD_TOKENS = 32, 2_000


def make_cache(folder: Path) -> tuple[Any, Lender]:
    """SGLang's cache on its CPU engine, its second level in shared memory that this process lends itself."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    sys.path.insert(0, str(STUB))
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    from specgen_engine.tier.base import page_shape
    from specgen_engine.tier.cache import TierRadixCache
    from specgen_engine.tier.lenders import Lenders
    from specgen_engine.tier.metrics import Stats
    from specgen_engine.tier.movers import LoopbackMover
    from specgen_engine.tier.pool import MHAArenaPool

    device = MHATokenToKVPool(
        head_num=2, head_dim=64, size=POOL, page_size=1, dtype=torch.bfloat16, layer_num=3, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    shape, backend, stats = page_shape(device, 1), LoopbackBackend(), Stats()
    lender = Lender(folder, "bench", backend, CHUNK_BYTES, CHUNKS)
    arena = PageArena(backend, shape.planes, _kv.ArenaLayout.PAGE_FIRST, CHUNKS, CHUNK_BYTES)
    lenders = Lenders(arena, folder, "bench", 1, CHUNKS, stats)
    lenders.look()
    pages = CHUNKS * arena.layout.pages_per_chunk
    pool = MHAArenaPool(device, shape, arena, LoopbackMover(shape, arena, stats), pages, stats)
    allocator = TokenToKVPoolAllocator(POOL, dtype=device.dtype, device="cpu", kvcache=device, need_sort=False)
    params = CacheInitParams(False, None, allocator, 1, tp_cache_group=dist.new_group([0]))
    cache: Any = TierRadixCache(params, hicache_arguments(), lambda *_a, **_k: pool)
    cache.lenders = lenders
    return cache, lender


def hicache_arguments() -> SimpleNamespace:
    """What a radix cache with a second level asks of SGLang's ServerArgs."""
    return SimpleNamespace(
        hicache_ratio=2.0, hicache_size=0, hicache_mem_layout="page_first", hicache_storage_backend=None,
        hicache_storage_backend_extra_config=None, hicache_storage_prefetch_policy="timeout",
        hicache_write_policy="write_through", hicache_io_backend="kernel", served_model_name="m",
        extra_metric_labels=None,
    )  # fmt: skip


def ids(seed: int, count: int) -> list[int]:
    return torch.randint(1_000, 40_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(cache: Any, prefix: list[int]) -> float:
    """Restore what only the tier has, seconds; or compute, as it were, what nobody has: 0."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey(prefix, None)
    found = cache.match_prefix(MatchPrefixParams(key=key))
    if found.host_hit_length:
        began = time.perf_counter()
        loaded, _ = cache.init_load_back(InitLoadBackParams(found.best_match_node, found.host_hit_length))
        seconds = time.perf_counter() - began
        assert len(loaded) == len(prefix), (len(loaded), len(prefix))
        return seconds
    allocator, missing = cache.token_to_kv_pool_allocator, len(prefix) - len(found.device_indices)
    if allocator.available_size() < missing:
        cache.evict(EvictParams(num_tokens=missing))
    if missing:
        value = torch.cat([found.device_indices, allocator.alloc(missing)])
        cache.insert(InsertParams(key=key, value=value))
    return 0.0


def step(cache: Any) -> None:
    cache.ready_to_load_host_cache()
    cache.check_hicache_events()


def measure(cache: Any, rounds: int) -> dict[str, list[float]]:
    longest = ids(5, LONGEST)
    groups = {str(tokens): [ids(tokens, tokens)] for tokens in ALONE}
    groups[f"{CROWD} x {CROWD_TOKENS}"] = [ids(900 + number, CROWD_TOKENS) for number in range(CROWD)]
    for prefix in [longest, *(prefix for group in groups.values() for prefix in group)]:
        ask(cache, prefix)
        step(cache)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in groups}
    counts = cache.stats.counts
    for _ in range(rounds + 1):
        for name, group in groups.items():
            ask(cache, longest)
            step(cache)
            checked = counts["check_seconds"]
            seconds = sum(ask(cache, prefix) for prefix in group)
            found[name].append((seconds, counts["check_seconds"] - checked))
            step(cache)
    return {  # the first round is not measured
        name: [round(statistics.median(column) * 1e3, 3) for column in zip(*samples[1:], strict=True)]
        for name, samples in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_tier_admission",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        cache, lender = make_cache(Path(folder))
        report: dict[str, Any] = dict(measure(cache, rounds))
        report["tag_reads"] = getattr(getattr(cache.pool.arena, "tags", None), "reads", None)
        cache.pool.check_integrity()
        cache.lenders.close()
        lender.close()
        dist.destroy_process_group()
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

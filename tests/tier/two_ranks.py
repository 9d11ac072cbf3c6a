"""Tensor-parallel ranks of a radix cache, run by test_two_ranks: `python -m tests.tier.two_ranks WORLD FOLDER`.

Each rank has a lender of its own. What they leave in FOLDER/rankN.json must be the same but for `own`.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tier.forked_ranks import fork_ranks
from tests.tier.support import Tier, buffers, radix_cache, tier

PAGE = 16
PREFIXES, LENGTH = 6, 160
ROUNDS, SEEDS = 300, (7, 8, 9)


def tokens_of(prefix: int) -> list[int]:
    return [10_000 * (prefix + 1) + i for i in range(LENGTH)]


def row_bytes(token: int, buffer: int, shape: torch.Size) -> torch.Tensor:
    """What the KV of a token is in this test, buffer by buffer."""
    generator = torch.Generator().manual_seed(token * 31 + buffer)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def publish(cache: Any, one: Tier, prefix: int) -> None:
    """Compute a prefix, put it into the tree, let the write finish."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    indices = cache.token_to_kv_pool_allocator.alloc(LENGTH)
    assert indices is not None
    for number, buffer in enumerate(buffers(one.device)):
        for token, index in zip(tokens_of(prefix), indices.tolist(), strict=True):
            buffer[index] = row_bytes(token, number, buffer[index].shape)
    cache.insert(InsertParams(key=RadixKey(tokens_of(prefix), None), value=indices))
    cache.check_hicache_events()


def restore(cache: Any, one: Tier, prefix: int) -> int:
    """Match, load back, compare every byte; returns the tokens that came from the device or the tier."""
    from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    found = cache.match_prefix(MatchPrefixParams(key=RadixKey(tokens_of(prefix), None)))
    indices = found.device_indices
    if found.host_hit_length:
        loaded, _ = cache.init_load_back(InitLoadBackParams(found.best_match_node, found.host_hit_length))
        indices = torch.cat([indices, loaded])
        cache.ready_to_load_host_cache()
        cache.check_hicache_events()
    for number, buffer in enumerate(buffers(one.device)):
        for token, index in zip(tokens_of(prefix), indices.tolist(), strict=False):
            assert torch.equal(buffer[index], row_bytes(token, number, buffer[index].shape)), (prefix, token)
    return len(indices)


def evict(cache: Any) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    cache.evict(EvictParams(num_tokens=10**6))


def tree(cache: Any) -> list[Any]:
    """The tree's shape and what each node holds, without arena pages."""
    from specgen_engine.tier.losses import subtree

    nodes = [node for node in subtree(cache.root_node) if node.parent is not None]
    return sorted([node.key.token_ids[0], len(node.key), node.evicted, node.backuped, node.lock_ref] for node in nodes)


def revoke(one: Tier, chunks: int) -> None:
    for lender in one.own:
        for epoch in lender.epochs().values():
            lender.revoke(epoch, chunks, bound_s=2.0)


def play(cache: Any, one: Tier, rank: int, world: int) -> dict[str, Any]:
    last = world - 1
    for prefix in range(PREFIXES):
        publish(cache, one, prefix)
    evict(cache)
    out: dict[str, Any] = {"published": tree(cache)}
    if rank == last:  # lost before a step: all ranks drop at that step
        revoke(one, 3)
    cache.check_hicache_events()
    out["after_loss"] = tree(cache)
    if rank == 0:  # lost between a step and a restore: all ranks restore the same, shorter prefix
        revoke(one, 5)
    # The newest first: lenders take back what they lent last, and the step after the first restore would drop it.
    out["restored"] = [restore(cache, one, prefix) for prefix in reversed(range(PREFIXES))]
    out["after_restores"] = tree(cache)
    if rank == last:  # lost while the GPU holds it too: written again as far as there is room
        revoke(one, 1)
    cache.check_hicache_events()
    cache.check_hicache_events()
    out["after_resident_loss"] = tree(cache)
    out["limit"] = cache.pool.limit
    evict(cache)
    out["again"] = [restore(cache, one, prefix) for prefix in range(PREFIXES)]
    counts = cache.pool.check_integrity()
    out["own"] = {**counts, **{k: v for k, v in cache.stats.counts.items() if v}}
    out["device"] = cache.token_to_kv_pool_allocator.available_size() + cache.evictable_size() + cache.protected_size()
    cache.reset()
    assert cache.pool.check_integrity()["used"] == 0
    return out


def storm(cache: Any, one: Tier, rank: int, seed: int) -> list[int]:
    """Random requests, prefetches and losses of each rank's own; a checksum of the tree and its indices after each."""
    from specgen_engine.tier.losses import subtree
    from tests.tier.storm import Storm
    from tests.tier.support import Setting

    seen: list[int] = []

    def see() -> None:
        nodes = [node for node in subtree(cache.root_node) if node.parent is not None]
        values = [[None if v is None else v.tolist() for v in (node.value, node.host_value)] for node in nodes]
        keys = [[list(node.key.token_ids), node.lock_ref] for node in nodes]
        seen.append(zlib.crc32(json.dumps([keys, values]).encode()))

    Storm(Setting(cache, one), seed, rank, most=2).play(ROUNDS, see)
    return seen


def run_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    own = folder / f"rank{rank}"
    own.mkdir(mode=0o700)
    with tier(own, "mha", PAGE, torch.float32, chunks=(13,), chunk_bytes=256 << 10, tokens=1024) as one:
        out = play(radix_cache(one, dist.group.WORLD), one, rank, world)
    out["storms"], out["own"]["storms"] = [], []
    for seed in SEEDS:
        with tier(own, "mha", PAGE, torch.float32, chunks=(6, 6), chunk_bytes=256 << 10, tokens=512) as one:
            out["storms"].append(storm(radix_cache(one, dist.group.WORLD), one, rank, seed))
            out["own"]["storms"].append(dict(one.pool.stats.counts))
            dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(out))
    dist.barrier()


def main() -> int:
    """Import SGLang once, then fork the ranks."""
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    import sglang.srt.mem_cache.hiradix_cache  # noqa: F401

    import specgen_engine.tier.cache  # noqa: F401

    return fork_ranks(world, lambda rank: run_rank(rank, world, folder))


if __name__ == "__main__":
    sys.exit(main())

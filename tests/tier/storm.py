"""Random requests, prefetches, evictions and losses on a radix cache, with its books checked after each."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import torch

from tests.tier.support import Setting, buffers

PAGE = 16
ROOTS, DEPTH, SEGMENT = 4, 4, 3 * PAGE


def ids_of(generator: random.Random) -> list[int]:
    """A path through a binary tree of segments, cut anywhere. A token names its place: no two paths share one."""
    root, place, ids = generator.randrange(ROOTS), 1, []
    for _ in range(generator.randrange(1, DEPTH + 1)):
        ids += [(root * 64 + place) * SEGMENT + i for i in range(SEGMENT)]
        place = 2 * place + generator.randrange(2)
    return ids[: generator.randrange(PAGE, len(ids) + 1)]


class Storm:
    """Of one rank. What the ranks do is drawn from `seed`, and what happens to this rank from `seed` and `rank`.

    At most `most` chunks are taken back at once.
    """

    def __init__(self, one: Setting, seed: int, rank: int = 0, most: int = 5) -> None:
        self.most = most
        self.cache, self.tier, self.one = one.cache, one.tier, one
        self.alike, self.own = random.Random(seed), random.Random(f"{seed}.{rank}")
        self.rid = 0
        counted = self.cache._count_ready_acks
        self.calm = False
        self.cache._count_ready_acks = lambda queue: 0 if not self.calm and self.own.random() < 0.5 else counted(queue)

    def play(self, rounds: int, see: Callable[[], None] = lambda: None) -> None:
        actions = [self.request] * 4 + [self.prefetch] * 4 + [self.step] * 3 + [self.lose, self.evict] * 2 + [self.grow]
        for number in range(rounds):
            self.alike.choice(actions)()
            if number % 150 == 149:
                self.reset()
            self.check()
            see()
        self.calm = True
        self.step()
        self.step()
        self.check()
        assert self.cache.protected_size() == 0

    def step(self) -> None:
        self.cache.check_hicache_events()

    def lose(self) -> None:
        """Of chunks that this rank borrowed, some are taken back, not always before the next step."""
        lender = self.own.choice(self.tier.own)
        for epoch in lender.epochs().values():
            lender.revoke(epoch, self.own.randint(1, self.most), bound_s=2.0)
        if self.alike.random() < 0.5:
            self.step()

    def grow(self) -> None:
        self.tier.lenders._last_revoked.clear()
        self.tier.lenders.look()

    def evict(self) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.cache.evict(EvictParams(num_tokens=self.alike.randrange(PAGE, 20 * PAGE)))

    def prefetch(self) -> None:
        queue = []
        for _ in range(self.alike.randrange(1, 4)):
            self.rid += 1
            ids = [*ids_of(self.alike), 5]
            queue.append(SimpleNamespace(rid=f"r{self.rid}", origin_input_ids=ids, output_ids=[], extra_key=None))
        self.cache.prefetcher.step(queue, self.alike.randrange(0, 4 * PAGE))

    def request(self) -> None:
        """What a request does: match, load back, compute the rest, publish."""
        from sglang.srt.mem_cache.base_prefix_cache import (
            EvictParams,
            InitLoadBackParams,
            InsertParams,
            MatchPrefixParams,
        )
        from sglang.srt.mem_cache.radix_cache import RadixKey

        cache, allocator = self.cache, self.one.allocator
        ids = ids_of(self.alike)
        ids = ids[: len(ids) // PAGE * PAGE]
        found = cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, None)))
        indices, node = found.device_indices, found.last_device_node
        cache.inc_lock_ref(node)
        if found.host_hit_length:
            loaded, end = cache.init_load_back(InitLoadBackParams(found.best_match_node, found.host_hit_length))
            cache.inc_lock_ref(end)
            cache.dec_lock_ref(node)
            indices, node = torch.cat([indices, loaded]), end
            cache.ready_to_load_host_cache()
        self.compare(ids, indices)
        left = len(ids) - len(indices)
        cache.evict(EvictParams(num_tokens=max(0, left - int(allocator.available_size()))))
        computed = allocator.alloc(left) if left else indices[:0]
        if computed is not None:
            for number, buffer in enumerate(buffers(self.tier.device)):
                buffer.view(torch.int32)[computed] = self.kv(ids[len(indices) :], number)
            indices = torch.cat([indices, computed])
            present = cache.insert(InsertParams(key=RadixKey(ids, None), value=indices)).prefix_len
            assert present == len(ids) - left, "what was matched is there, and nothing more"
        cache.dec_lock_ref(node)

    def kv(self, ids: list[int], number: int) -> torch.Tensor:
        return (torch.tensor(ids, dtype=torch.int32) * 8 + number).view(-1, 1, 1)

    def compare(self, ids: list[int], indices: torch.Tensor) -> None:
        for number, buffer in enumerate(buffers(self.tier.device)):
            held = buffer.view(torch.int32)[indices]
            assert bool((held == self.kv(ids[: len(indices)], number)).all()), "a prefix came back with other bytes"

    def reset(self) -> None:
        """As SGLang flushes an idle scheduler's cache; a prefetch may be under way then."""
        self.cache.reset()
        self.one.allocator.clear()
        assert not self.cache.ongoing_load_back
        assert self.cache.ready_to_load_host_cache() == -1

    def check(self) -> None:
        from specgen_engine.tier.losses import subtree

        cache, pool = self.cache, self.tier.pool
        nodes = [node for node in subtree(cache.root_node) if node.parent is not None]
        for node in nodes:
            above = node.parent
            assert not node.evicted or node.backuped
            assert node.evicted or above.parent is None or not above.evicted, "resident below an evicted node"
            assert not node.backuped or above.parent is None or above.backuped, "a gap in the second level"
            assert node.lock_ref == 0 or not node.evicted
        copies = [node.host_value for node in nodes if node.backuped]
        slots = torch.cat([*copies, torch.empty(0, dtype=torch.int64)])
        assert len(slots.unique()) == len(slots)
        assert int(pool.slot_used.sum()) == len(slots)
        assert bool(pool.slot_used[slots].all())
        pool.check_integrity()
        assert self.one.accounted() == self.tier.device.size
        on_device = sum(len(node.value) for node in nodes if not node.evicted)
        assert on_device == cache.evictable_size() + cache.protected_size()

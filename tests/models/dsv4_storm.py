"""Random requests, prefetches, evictions and losses on DeepSeek-V4's cache, with all books checked after each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from tests.models import dsv4_support as v4
from tests.models.dsv4_support import PAGE, Setting

ROOTS, DEPTH = 3, 4
SEGMENT = 2  # pages


def pages_of(generator: random.Random) -> list[int]:
    """A path through a binary tree of segments, cut at any page. A number names a page's place in it."""
    root, place, pages = generator.randrange(ROOTS), 1, []
    for _ in range(generator.randrange(1, DEPTH + 1)):
        pages += [(root * 64 + place) * SEGMENT + i for i in range(SEGMENT)]
        place = 2 * place + generator.randrange(2)
    return pages[: generator.randrange(1, len(pages) + 1)]


def ids_of(pages: list[int]) -> list[int]:
    return [page * PAGE + at for page in pages for at in range(PAGE)]


class Storm:
    """Of one rank. What the ranks do is drawn from `seed`, and what happens to this rank from `seed` and `rank`."""

    def __init__(self, one: Setting, seed: int, rank: int = 0, folder: Path | None = None) -> None:
        self.one, self.cache, self.folder = one, one.cache, folder
        self.alike, self.own = random.Random(seed), random.Random(f"{seed}.{rank}")
        self.rid, self.deaths = 0, 0
        counted = self.cache._count_ready_acks
        self.calm = False
        self.cache._count_ready_acks = lambda queue: 0 if not self.calm and self.own.random() < 0.5 else counted(queue)

    def play(self, rounds: int, see: Callable[[], None] = lambda: None) -> None:
        actions = [self.request] * 6 + [self.prefetch] * 3 + [self.step] * 3 + [self.lose, self.evict] * 2
        actions += [self.surprise] + [self.grow] * 3
        actions += [self.die] if self.folder is not None else []
        for number in range(rounds):
            self.alike.choice(actions)()
            if number % 100 == 99:
                self.reset()
            self.one.books()
            see()
        self.calm = True
        for _ in range(6):  # what is written again where too little room is left is lost again, until ranks agree on it
            self.step()
        self.one.books()
        assert self.cache.full_protected_size() == self.cache.swa_protected_size() == 0

    def step(self) -> None:
        self.cache.check_hicache_events()

    def lose(self) -> None:
        """Of chunks that this rank borrowed, some are taken back, not always before the next step."""
        self.take_back()
        if self.alike.random() < 0.5:
            self.step()

    def take_back(self) -> None:
        lender = self.own.choice(self.one.own)
        for epoch in lender.epochs().values():
            if self.own.random() < 0.7:
                lender.revoke(epoch, self.own.randint(1, 3), bound_s=2.0)

    def surprise(self) -> None:
        """Pages of prefixes that only the tier has are lost between a step and the requests that ask for them."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        self.cache.evict(EvictParams(num_tokens=10**6, swa_num_tokens=10**6))
        self.take_back()
        for _ in range(3):
            self.request()

    def die(self) -> None:
        """A lender ends without a word; another one comes. What it lent stays readable until it is given back."""
        assert self.folder is not None
        number = self.own.randrange(len(self.one.own))
        chunks = self.one.own[number].counts().total
        self.one.own[number].crash()
        self.deaths += 1
        name = f"again-{self.deaths}"
        self.one.own[number] = Lender(self.folder, name, LoopbackBackend(), 2 * v4.MIB, chunks)
        self.grow()

    def grow(self) -> None:
        for lenders in self.cache.all_lenders:
            lenders._last_revoked.clear()
            lenders.look()

    def evict(self) -> None:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        tokens, window = (self.alike.randrange(0, 12) * PAGE for _ in range(2))
        self.cache.evict(EvictParams(num_tokens=tokens, swa_num_tokens=window))

    def prefetch(self) -> None:
        queue = []
        for _ in range(self.alike.randrange(1, 4)):
            self.rid += 1
            ids = [*ids_of(pages_of(self.alike)), 5]
            queue.append(SimpleNamespace(rid=f"r{self.rid}", origin_input_ids=ids, output_ids=[], extra_key=None))
        self.cache.prefetcher.step(queue, self.alike.randrange(0, 4) * PAGE)

    def request(self) -> None:
        """What a request does: match, load back, compute the rest, publish. Its window may have passed some of it."""
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        cache, pages = self.cache, pages_of(self.alike)
        key = RadixKey(ids_of(pages), None)
        found = cache.match_prefix(MatchPrefixParams(key=key))
        req = v4.request(found)
        indices, node = found.device_indices, found.last_device_node
        lock = cache.inc_lock_ref(node)
        if found.host_hit_length or found.swa_host_hit_length:
            params = InitLoadBackParams(found.best_match_node, found.host_hit_length, req=req)
            loaded, end = cache.init_load_back(params)
            locked = cache.inc_lock_ref(end)
            cache.dec_lock_ref(node, lock.to_dec_params())
            indices, node, lock = torch.cat([indices, loaded]), end, locked
            cache.ready_to_load_host_cache()
        self.compare(pages, indices)
        computed = self.one.take(len(pages) * PAGE - len(indices))
        if computed is not None:
            self.compute(pages[len(indices) // PAGE :], computed)
            own = self.alike.randrange(len(computed) // PAGE) * PAGE if len(computed) else 0
            self.one.allocator.free_swa(computed[:own])
            value, released = torch.cat([indices, computed]), len(indices) + own if own else 0
            cache.insert(
                InsertParams(key=key, value=value, prev_prefix_len=len(indices), swa_evicted_seqlen=released)
            )  # fmt: skip
        cache.dec_lock_ref(node, lock.to_dec_params())

    def compute(self, pages: list[int], indices: torch.Tensor) -> None:
        if not pages:
            return
        for space, at in zip(self.one.spaces, (indices, self.one.window_of(indices)), strict=True):
            for value, page in zip(pages, (at[::PAGE] // PAGE).tolist(), strict=True):
                v4.stamp(space, page, value)

    def compare(self, pages: list[int], indices: torch.Tensor) -> None:
        tokens, window = self.one.spaces
        for value, page in zip(pages, (indices[::PAGE] // PAGE).tolist(), strict=False):
            assert v4.holds(tokens, page, value), "a prefix came back with other bytes"
        if len(indices):
            last = int(self.one.window_of(indices[-PAGE:])[0]) // PAGE
            assert last > 0, "a prefix came back without its window"
            assert v4.holds(window, last, pages[len(indices) // PAGE - 1]), "a window came back with other bytes"

    def reset(self) -> None:
        """As SGLang flushes an idle scheduler's cache; a prefetch may be under way then."""
        self.cache.reset()
        self.one.allocator.clear()
        assert not self.cache.ongoing_load_back
        assert self.cache.ready_to_load_host_cache() == -1


def tree_of(cache: Any) -> list[Any]:
    """Shape, indices and locks of a tree: what tensor-parallel ranks must have alike."""
    nodes = cache.tree_core._collect_all_nodes()[1:]
    parts = [
        [
            [None if value is None else value.tolist() for value in (data.value, data.host_value)]
            for data in node.component_data[:2]
        ]
        for node in nodes
    ]
    return [[[list(node.key.token_ids)[::PAGE], part] for node, part in zip(nodes, parts, strict=True)]]

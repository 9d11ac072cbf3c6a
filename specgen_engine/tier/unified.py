"""SGLang's UnifiedRadixCache over arenas, for DeepSeek-V4: one pool for tokens, one for the window.

Eviction, write-through, load-back layer by layer, tombstones, locks and the agreement of ranks are UnifiedRadixCache's
own. Ours are the two host pools, the check before a restore, and what becomes of lost pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache import unified_radix_cache
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool_host import HostPoolGroup
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from specgen_engine.errors import HookError
from specgen_engine.kv.hold import Hold
from specgen_engine.tier import unified_losses as losses
from specgen_engine.tier.common import MAX, MIN, Ahead, ReuseStrategy, TierCache, TierWrites, copy_mark
from specgen_engine.tier.dsv4 import Space
from specgen_engine.tier.losses import evicted_chain
from specgen_engine.tier.policy import Source, spare_tokens
from specgen_engine.tier.pool import ArenaPool
from specgen_engine.tier.prefetch import Prefetcher
from specgen_engine.tier.unified_losses import FULL, WINDOW, Readable

logger = logging.getLogger(__name__)

Held = list[tuple[ArenaPool, Hold]]


class Part(NamedTuple):
    """An index space and the pool that holds its copies."""

    space: Space
    pool: ArenaPool


class Parts(NamedTuple):
    tokens: Part
    window: Part


class TierHybridController(TierWrites, HybridCacheController):
    """UnifiedRadixCache's controller."""


class TierTreeCore(UnifiedTreeCore):
    """Asks the cache whose tokens a node holds; `tier` is set before the first request."""

    tier: UnifiedTierCache

    def _inc_hit_count_and_check(self, node: Any, chunked: bool = False) -> bool:
        return bool(super()._inc_hit_count_and_check(node, self.tier.stays_unwritten(node) or chunked))

    def _add_new_node(self, *where: Any, **how: Any) -> Any:
        """SGLang cuts a new node at its window before it asks about it: an answer's parts are told from here on."""
        node = super()._add_new_node(*where, **how)
        self.tier.mark_answer(node)
        return node

    def _split_node(self, key: Any, child: Any, split_len: int) -> Any:
        node, action = super()._split_node(key, child, split_len)
        copy_mark(node, child)
        self.tier.follow_split(child, node)
        return node, action


class ArenaStack(hybrid_pool_assembler.StackStrategy):
    """Where SGLang would make a host pool of each buffer, it gets two arena pools."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def matches(self, kvcache: Any, components: set[Any]) -> bool:
        return components == {FULL, WINDOW}

    def build(
        self, *, cache: Any, kvcache: Any, params: Any, server_args: Any, load_cache_event: Any,
        prefetch_threshold: int = 256, model_name: str | None = None, **_storage: Any,
    ) -> Any:  # fmt: skip
        layers = kvcache.end_layer - kvcache.start_layer
        group = HostPoolGroup([
            self._entry(PoolName.KV, self._parts.tokens, kvcache, layers, is_anchor=True),
            self._entry(
                PoolName.SWA, self._parts.window, kvcache.swa_kv_pool, layers,
                host_evict_fn=lambda tokens: cache.evict_host(tokens, WINDOW),
                device_evict_fn=lambda tokens: cache.evict(EvictParams(swa_num_tokens=tokens)),
                device_alloc_fn=params.token_to_kv_pool_allocator.swa_attn_allocator.alloc,
                device_free_fn=params.token_to_kv_pool_allocator.swa_attn_allocator.free,
            ),
        ])  # fmt: skip
        controller = TierHybridController(
            params.token_to_kv_pool_allocator,
            group,
            params.page_size,
            params.tp_cache_group,
            load_cache_event=load_cache_event,
            attn_cp_group=params.attn_cp_cache_group,
            attn_tp_group=params.attn_tp_cache_group,
            pp_group=params.pp_cache_group,
            write_policy=server_args.hicache_write_policy,
            io_backend=server_args.hicache_io_backend,
            prefetch_threshold=prefetch_threshold,
            model_name=model_name,
            transfer_layer_num=layers,
        )
        pools = {FULL: self._parts.tokens.pool, WINDOW: self._parts.window.pool}
        return hybrid_pool_assembler.StackBuildResult(
            group, controller, pools, transfer_layer_num=layers, pools_desc="arena: tokens, window"
        )

    @staticmethod
    def _entry(name: Any, part: Part, device_pool: Any, layers: int, **how: Any) -> Any:
        mapping = {layer: local for local, layer in enumerate(part.space.layers)}
        return hybrid_pool_assembler.build_pool_entry(
            name=name, host_pool=part.pool, device_pool=device_pool, layer_mapping=mapping,
            transfer_layer_num=layers, **how,
        )  # fmt: skip


@contextmanager
def substituted(make_cache: Callable[[Any], Any], parts: Parts) -> Iterator[None]:
    """While SGLang makes its radix cache, the class, the tree and the host pools that it names are ours."""
    places = [
        (unified_radix_cache, "UnifiedRadixCache", make_cache),
        (unified_radix_cache, "create_tree_core", lambda name, params, components: TierTreeCore(params, components)),
        (hybrid_pool_assembler, "_STRATEGIES", [ArenaStack(parts)]),
    ]
    missing = [name for module, name, _ in places if not hasattr(module, name)]
    if missing:
        raise HookError(f"SGLang's unified radix cache has no {', '.join(missing)}: the remote KV tier does not fit it")
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(places, before, strict=True):
            setattr(module, name, value)


class UnifiedTierCache(TierCache, UnifiedRadixCache):
    """Args as UnifiedRadixCache's, and the pools; SGLang calls `init_hicache` next."""

    def __init__(self, params: Any, parts: Parts) -> None:
        self.stats = parts.tokens.pool.stats
        super().__init__(params)
        self.parts = parts
        self.tree_core.tier = self
        self.tree_core.eviction_strategy = ReuseStrategy(self.segment_of)
        self.prefetcher = Prefetcher(self)

    def init_hicache(self, server_args: Any, params: Any) -> None:
        super().init_hicache(server_args, params)
        self._agree_on_losses()

    def follow_split(self, node: Any, first: Any) -> None:
        """What a load or write under way did not lock of a node, it did not lock of the part cut from it either.

        SGLang knows such nodes by their ids only, and would give up another's lock on the new part when it ends.
        """
        loads = [held for load in self.ongoing_load_back.values() for held in (load.lock_params, load.host_lock_params)]
        for params in (*loads, *(write.lock_params for write in self.ongoing_write_through.values())):
            for skipped in params.skip_lock_node_ids.values() if params is not None else ():
                if node.id in skipped:
                    skipped.add(first.id)

    # ---- restores

    def init_load_back(self, params: InitLoadBackParams) -> Any:
        """Only what every rank can read is loaded; the rest of the prefix is computed again."""
        began = time.perf_counter()
        req = params.req
        assert req is not None
        end, held = self._readable(self.tree_core.node_by_id(params.best_match_node))
        if end is None:
            answer = self.tree_core.empty_match_result.device_indices, req.last_node
        else:
            params.best_match_node = end.id
            with self._loading(held) as tokens:
                answer = super().init_load_back(params)
            req.host_hit_length = sum(tokens)
        self.stats.add("admission_seconds", time.perf_counter() - began)
        return answer

    @contextmanager
    def _loading(self, held: Held) -> Iterator[list[int]]:
        """What `held` keeps is read by the load that is queued meanwhile, or let go; the tokens of each such load."""
        queue, tokens = self.cache_controller.load_queue, list[int]()
        before = len(queue)
        yield tokens
        if len(queue) > before:
            for pool, hold in held:
                pool.await_start(hold)
            tokens.append(len(queue[-1].host_indices))
            self.stats.add("restores")
            self.stats.add("restored_tokens", tokens[-1])
        else:
            for _, hold in held:
                hold.release()

    def _readable(self, node: Any) -> tuple[Any, Held]:
        """(the last node down to which all ranks can read, this rank's hold on those pages); no node: nothing now."""
        core, size = self.tree_core, self.page_size
        chains = evicted_chain(node), losses.window_chain(core, node)
        if not any(chains):
            return node, []
        pools = [part.pool for part in self.parts]
        wanted = [losses.copies(chain, part) for chain, part in zip(chains, (FULL, WINDOW), strict=True)]
        began = time.perf_counter()
        restores = [pool.begin_restore(indices) for pool, indices in zip(pools, wanted, strict=True)]
        self.stats.add("check_seconds", time.perf_counter() - began)
        quiet = any(restore.quiet for restore in restores)
        *pages, not_quiet = self._agree([*(restore.pages for restore in restores), 0 if quiet else 1], MIN)
        held = [(pool, one.held) for pool, one in zip(pools, restores, strict=True) if one.held is not None]
        if not_quiet and [count * size for count in pages] == [len(indices) for indices in wanted]:
            return node, held
        for _, hold in held:
            hold.release()
        if not not_quiet:
            self.stats.add("quiet_misses")
            return None, []
        tokens = losses.depth(node)
        if not losses.cut(self, *chains, Readable(*pages)):
            self.stats.add("missed_tokens", len(wanted[0]))
            return None, []
        end = losses.end_of_match(core, self._left_of(node))
        self.stats.add("missed_tokens", tokens - losses.depth(end))
        return self._readable(end)

    def _left_of(self, node: Any) -> Any:
        """A node, or its last ancestor that a cut has left in the tree."""
        while node.id not in self.tree_core._node_arena:
            node = node.parent
        return node

    # ---- loads before admission

    def spare_window(self, running: int) -> int:
        free, kept = self.token_to_kv_pool_allocator.swa_available_size(), self.swa_evictable_size()
        return spare_tokens(int(free), int(kept), running * (self.sliding_window_size + 2 * self.page_size))

    def unread_tokens(self) -> int:
        """KV of forks' answers that nobody uses: what is evicted first, and read by no one again."""
        leaves = self.tree_core.evictable_device_leaves
        return sum(len(node.key) for node in leaves if self.segment_of(node).source is Source.FORK)

    def fetch_ahead(self, matches: Iterable[Any], quota: int) -> int:
        """Load what matches of waiting requests have in the tier only, up to `quota` tokens; into free KV only."""
        tokens, nodes = 0, set()
        for match in matches:
            free = self.token_to_kv_pool_allocator.available_size()
            if not 0 < max(match.host_hit_length, match.swa_host_hit_length) <= min(quota - tokens, free):
                continue
            end, held = self._readable(self.tree_core.node_by_id(match.best_match_node))
            if end is None:
                continue
            with self._loading(held) as loaded:
                self.load_back(end.id, mem_quota=quota - tokens)
            if loaded:
                nodes.add(end.id)
                tokens += sum(loaded)
        if nodes:
            self._ahead = Ahead(frozenset(nodes), self.ready_to_load_host_cache())
            self.stats.add("prefetched_tokens", tokens)
        return tokens

    # ---- losses

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        self._agree_on_losses()

    def _agree_on_losses(self) -> None:
        """One small reduction a step; a second one only when a rank has lost pages since the last."""
        pools = [part.pool for part in self.parts]
        lost = [pool.lost_pages() for pool in pools]
        own = [0 if any(len(pages) for pages in lost) else 1, *(pool.capacity() for pool in pools)]
        unhurt, *limits = self._agree(own, MIN)
        for pool, limit in zip(pools, limits, strict=True):
            pool.limit = limit
        for prefix, pool in zip(("", "window_"), pools, strict=True):
            self.stats.put(f"{prefix}capacity_pages", pool.limit)
            self.stats.put(f"{prefix}used_pages", pool.used_pages())
        if unhurt:
            return
        mask = torch.zeros(sum(pool.page_num for pool in pools), dtype=torch.uint8)
        first = pools[0].page_num
        mask[torch.from_numpy(np.concatenate([lost[0], lost[1] + first]))] = 1
        self._all_reduce(mask, MAX)
        flags = mask.numpy().astype(np.bool_)
        pages = losses.drop(self, {FULL: flags[:first], WINDOW: flags[first:]})
        self.stats.add("lost_pages", pages)
        if pages:
            logger.info("remote KV tier: %d pages dropped", pages)

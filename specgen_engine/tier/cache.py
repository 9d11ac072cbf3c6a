"""SGLang's HiRadixCache over an arena: what is read back is checked first, and what one rank loses all ranks drop.

Everything else is HiRadixCache's own: eviction, write-through, load-back layer by layer, storage backends, locks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache import hiradix_cache
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams
from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

from specgen_engine.errors import HookError
from specgen_engine.tier import losses
from specgen_engine.tier.common import MAX, MIN, Ahead, ReuseStrategy, TierCache, TierWrites, copy_mark
from specgen_engine.tier.events import LaunchCounter, stream_number
from specgen_engine.tier.policy import Source
from specgen_engine.tier.pool import ArenaPool
from specgen_engine.tier.prefetch import Prefetcher

logger = logging.getLogger(__name__)

SUBSTITUTED = ("get_mha_host_pool_cls", "MLATokenToKVPoolHost", "HiCacheController")


class TierController(TierWrites, HiCacheController):
    """HiRadixCache's controller, with an event for each launch of a load instead of one for each layer."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        pool: ArenaPool = self.mem_pool_host
        self.layer_done_counter = LaunchCounter(self.layer_num, pool.mover, stream_number(self.device))
        self.mem_pool_device.register_layer_transfer_counter(self.layer_done_counter)
        pool.mover.prepare(self.load_stream, self.mem_pool_device.size // pool.page_size)


@contextmanager
def substituted(make_pool: Callable[..., ArenaPool]) -> Iterator[None]:
    """While HiRadixCache sets itself up, the host pools that it names are ours."""
    missing = [name for name in SUBSTITUTED if not hasattr(hiradix_cache, name)]
    if missing:
        raise HookError(f"SGLang's hiradix_cache has no {', '.join(missing)}: the remote KV tier does not fit it")
    ours = (lambda _pool: make_pool, make_pool, TierController)
    before = [getattr(hiradix_cache, name) for name in SUBSTITUTED]
    for name, value in zip(SUBSTITUTED, ours, strict=True):
        setattr(hiradix_cache, name, value)
    try:
        yield
    finally:
        for name, value in zip(SUBSTITUTED, before, strict=True):
            setattr(hiradix_cache, name, value)


class TierRadixCache(TierCache, HiRadixCache):
    """Args as HiRadixCache's, and what makes its pool."""

    def __init__(self, params: Any, server_args: Any, make_pool: Callable[..., ArenaPool]) -> None:
        with substituted(make_pool):
            super().__init__(params, server_args)
        self.pool: ArenaPool = self.token_to_kv_pool_host
        self.stats = self.pool.stats
        self.eviction_strategy = ReuseStrategy(self.segment_of)
        self.prefetcher = Prefetcher(self)
        self._agree_on_losses()

    def _inc_hit_count(self, node: Any, chunked: bool = False) -> None:
        super()._inc_hit_count(node, self.stays_unwritten(node) or chunked)

    def _split_node(self, key: Any, child: Any, split_len: int) -> Any:
        node = super()._split_node(key, child, split_len)
        copy_mark(node, child)
        return node

    # ---- restores

    def init_load_back(self, params: InitLoadBackParams) -> Any:
        """Only what every rank can read is loaded; the rest of the prefix is computed again."""
        began = time.perf_counter()
        end, held = self._readable(params.best_match_node)
        params.best_match_node = end
        indices, node = super().init_load_back(params)
        if held is not None:
            if len(indices):
                self.pool.await_start(held)
                self.stats.add("restores")
                self.stats.add("restored_tokens", len(indices))
            else:
                held.release()
        if params.req is not None:
            params.req.host_hit_length = len(indices)
        self.stats.add("admission_seconds", time.perf_counter() - began)
        return indices, node

    def unread_tokens(self) -> int:
        """KV of forks' answers that nobody uses: what is evicted first, and read by no one again."""
        return sum(len(node.key) for node in self.evictable_leaves if self.segment_of(node).source is Source.FORK)

    def fetch_ahead(self, matches: Iterable[Any], quota: int) -> int:
        """Load what matches of waiting requests have in the tier only, up to `quota` tokens.

        `quota` is free, or forks' answers, which are then evicted, and nothing else. `matches` is read one by one: each
        is made after the last one's nodes have been given their pages.
        """
        tokens, nodes = 0, set()
        for match in matches:
            wanted, free = match.host_hit_length, self.token_to_kv_pool_allocator.available_size()
            if not 0 < wanted <= min(quota - tokens, free + self.unread_tokens()):
                continue
            if wanted > free:
                self.evict(EvictParams(num_tokens=wanted - free))
            params = InitLoadBackParams(match.best_match_node, wanted, mem_quota=quota - tokens)
            indices, node = self.init_load_back(params)
            if len(indices):
                nodes.add(node.id)
                tokens += len(indices)
        if tokens:
            self._ahead = Ahead(frozenset(nodes), self.ready_to_load_host_cache())
            self.stats.add("prefetched_tokens", tokens)
        return tokens

    def _readable(self, node: Any) -> tuple[Any, Any]:
        """(the last node down to which all ranks can read, this rank's hold on those pages)."""
        chain = losses.evicted_chain(node)
        if not chain:
            return node, None
        host_indices = torch.cat([one.host_value for one in chain])
        began = time.perf_counter()
        restore = self.pool.begin_restore(host_indices)
        self.stats.add("check_seconds", time.perf_counter() - began)
        pages, not_quiet = self._agree([restore.pages, 0 if restore.quiet else 1], MIN)
        wanted = len(host_indices) // self.page_size
        if pages == wanted and restore.held is not None:
            return node, restore.held
        if restore.held is not None:
            restore.held.release()
        if not not_quiet:
            self.stats.add("quiet_misses")
            return chain[0].parent, None
        self.stats.add("missed_tokens", (wanted - pages) * self.page_size)
        end = losses.cut(self, chain, pages * self.page_size)
        return self._readable(end) if end is not None else (chain[0].parent, None)

    # ---- losses

    def check_hicache_events(self) -> None:
        super().check_hicache_events()
        self._agree_on_losses()

    def _agree_on_losses(self) -> None:
        """One small reduction a step; a second one only when a rank has lost pages since the last."""
        lost = self.pool.lost_pages()
        unhurt, limit = self._agree([0 if len(lost) else 1, self.pool.capacity()], MIN)
        self.pool.limit = limit
        self.stats.put("capacity_pages", limit)
        self.stats.put("used_pages", self.pool.used_pages())
        if unhurt:
            return
        mask = torch.zeros(self.pool.page_num, dtype=torch.uint8)
        mask[torch.from_numpy(lost)] = 1
        self._all_reduce(mask, MAX)
        self.drop(mask.numpy().astype(np.bool_))

    def drop(self, lost: NDArray[np.bool_]) -> None:
        """Forget the second-level copies of these logical pages; what the GPU still has is written again."""
        pages = losses.drop(self, lost)
        self.stats.add("lost_pages", pages)
        if pages:
            logger.info("remote KV tier: %d pages dropped", pages)

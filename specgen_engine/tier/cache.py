"""SGLang's HiRadixCache over an arena: what is read back is checked first, and what one rank loses all ranks drop.

Everything else is HiRadixCache's own: eviction, write-through, load-back layer by layer, storage backends, locks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache import hiradix_cache
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams
from sglang.srt.mem_cache.evict_policy import EvictionStrategy
from sglang.srt.mem_cache.hiradix_cache import HiRadixCache

from specgen_engine.errors import HookError
from specgen_engine.kv.base import StalePages
from specgen_engine.protocol import is_fork, search_of
from specgen_engine.tier import losses
from specgen_engine.tier.policy import Destination, Segment, Source, destination, eviction_rank
from specgen_engine.tier.pool import ArenaPool
from specgen_engine.tier.prefetch import Prefetcher

logger = logging.getLogger(__name__)

MIN, MAX = torch.distributed.ReduceOp.MIN, torch.distributed.ReduceOp.MAX
MARK, COUNTED = "specgen_source", "specgen_hits_counted"  # attributes of SGLang's nodes and requests
SUBSTITUTED = ("get_mha_host_pool_cls", "MLATokenToKVPoolHost", "HiCacheController")


class Writer(NamedTuple):
    """Whose tokens are being put into the tree."""

    source: Source
    search: str
    finished: bool


NOBODY = Writer(Source.PLAIN, "", False)


class Ahead(NamedTuple):
    """A load that belongs to no batch: its nodes, as they are known while they load, and its layers' events."""

    nodes: frozenset[int]
    consumer: int


NOTHING_AHEAD = Ahead(frozenset(), -1)


class TierController(HiCacheController):
    """Indices of the second level stay on the host: tables are made there."""

    def move_indices(self, host_indices: torch.Tensor, device_indices: torch.Tensor) -> Any:
        return host_indices, device_indices

    def _page_backup(self, operation: Any) -> None:
        """A page that a lender took back before it was stored is not stored."""
        try:
            super()._page_backup(operation)
        except StalePages:
            logger.info("storage: pages were taken back before they were written")


class ReuseStrategy(EvictionStrategy):
    """Eviction by policy.eviction_rank."""

    def __init__(self, segment_of: Callable[[Any], Segment]) -> None:
        self._segment_of = segment_of

    def get_priority(self, node: Any) -> tuple[float, float]:
        return eviction_rank(self._segment_of(node))


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


class TierRadixCache(HiRadixCache):
    """Args as HiRadixCache's, and what makes its pool."""

    lenders: Any
    own_lender: Any

    def __init__(self, params: Any, server_args: Any, make_pool: Callable[..., ArenaPool]) -> None:
        self._searches: Container[str] = ()
        self._writer = NOBODY
        self._ahead = NOTHING_AHEAD
        with substituted(make_pool):
            super().__init__(params, server_args)
        self.pool: ArenaPool = self.token_to_kv_pool_host
        self.stats = self.pool.stats
        self.eviction_strategy = ReuseStrategy(self.segment_of)
        self.prefetcher = Prefetcher(self)
        self._agree_on_losses()

    def reset(self) -> None:
        """A flushed scheduler is idle, but a prefetch may be under way: its pages are given away only once it ended."""
        for ack in self.cache_controller.ack_load_queue:
            ack.finish_event.synchronize()
        super().reset()
        self.ongoing_load_back.clear()
        self._ahead = NOTHING_AHEAD

    # ---- policy

    def follow_searches(self, running: Container[str]) -> None:
        """`running` holds the searches that are live, now and later."""
        self._searches = running

    def _live(self, search: str) -> bool:
        return search in self._searches

    def segment_of(self, node: Any) -> Segment:
        source, search = getattr(node, MARK, (Source.PLAIN, ""))
        return Segment(source, bool(search) and self._live(search), node.hit_count, node.last_access_time)

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        with self._writing(req, finished=False):
            super().cache_unfinished_req(req, chunked)

    def cache_finished_req(self, req: Any, is_insert: bool = True, **arguments: Any) -> None:
        with self._writing(req, finished=True):
            super().cache_finished_req(req, is_insert, **arguments)

    @contextmanager
    def _writing(self, req: Any, finished: bool) -> Iterator[None]:
        self._count_hits(req)
        rid = str(req.rid)
        if is_fork(rid):
            self._writer = Writer(Source.FORK, search_of(rid), finished)
        elif self._live(rid):
            self._writer = Writer(Source.BASE, rid, finished)
        else:
            self._writer = Writer(Source.PLAIN, "", finished)
        try:
            yield
        finally:
            self._writer = NOBODY

    def _inc_hit_count(self, node: Any, chunked: bool = False) -> None:
        """A fork that finds its prefix is a hit there like any other; what it adds itself is not written."""
        source, search, finished = self._writer
        owner = getattr(node, MARK, None)
        if owner is None or (owner[0] is Source.FORK and source is not Source.FORK):
            setattr(node, MARK, (source, search))
            drop = destination(source, finished) is Destination.DROP
        else:
            drop = owner[0] is Source.FORK
        super()._inc_hit_count(node, chunked or drop)

    def _split_node(self, key: Any, child: Any, split_len: int) -> Any:
        node = super()._split_node(key, child, split_len)
        if hasattr(child, MARK):
            setattr(node, MARK, getattr(child, MARK))
        return node

    def _count_hits(self, req: Any) -> None:
        if req._cache_breakdown_computed and not getattr(req, COUNTED, False):
            setattr(req, COUNTED, True)
            self.stats.add("hit_tokens_device", req.cached_tokens_device)
            self.stats.add("hit_tokens_tier", req.cached_tokens_host)
            self.stats.add("hit_tokens_storage", req.cached_tokens_storage)

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

    def ready_to_load_host_cache(self) -> int:
        """The events that a batch's layers wait for: its own load's, else those of a prefetch that is under way.

        Loads follow each other on one stream, so its own load's events come after the prefetch's.
        """
        began = time.perf_counter()
        consumer: int = super().ready_to_load_host_cache()
        if consumer >= 0:
            spent = time.perf_counter() - began
            self.stats.add("admission_seconds", spent)
            self.stats.add("launch_seconds", spent)
            return consumer
        if self._ahead.nodes and self._ahead.nodes.isdisjoint(self.ongoing_load_back):
            self._ahead = NOTHING_AHEAD
        return self._ahead.consumer

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
        self.stats.put("used_pages", self.pool.page_num - self.pool.available_size() // self.page_size)
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

    def _agree(self, values: list[int], operation: Any) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        self._all_reduce(tensor, operation)
        return [int(value) for value in tensor]

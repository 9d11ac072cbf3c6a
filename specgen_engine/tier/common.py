"""What the tier adds to a radix cache of SGLang's, whichever it is: whose tokens are written, hits, layers' events."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.evict_policy import EvictionStrategy

from specgen_engine.kv.base import StalePages
from specgen_engine.protocol import is_fork, search_of
from specgen_engine.tier.metrics import Stats
from specgen_engine.tier.policy import Destination, Segment, Source, destination, eviction_rank

logger = logging.getLogger(__name__)

MIN, MAX = torch.distributed.ReduceOp.MIN, torch.distributed.ReduceOp.MAX
MARK, COUNTED = "specgen_source", "specgen_hits_counted"  # attributes of SGLang's nodes and requests


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


class TierWrites:
    """Of a controller of SGLang's. Indices of the second level stay on the host: tables are made there."""

    write_queue: list[Any]
    write_stream: Any
    forward_stream: Any = None

    def start_writing(self) -> None:
        """Behind the forward that was launched last: a fork point's newest token may be computed in it.

        SGLang's own writes are of steps that have ended, so it waits for less: for what that forward reads.
        """
        if self.write_queue and self.forward_stream is not None:
            self.write_stream.wait_stream(self.forward_stream)
        super().start_writing()  # type: ignore[misc]

    def move_indices(self, host_indices: torch.Tensor, device_indices: torch.Tensor) -> Any:
        return host_indices, device_indices

    def _page_backup(self, operation: Any) -> None:
        """A page that a lender took back before it was stored is not stored."""
        try:
            super()._page_backup(operation)  # type: ignore[misc]
        except StalePages:
            logger.info("storage: pages were taken back before they were written")


class ReuseStrategy(EvictionStrategy):
    """Eviction by policy.eviction_rank."""

    def __init__(self, segment_of: Callable[[Any], Segment]) -> None:
        self._segment_of = segment_of

    def get_priority(self, node: Any) -> tuple[float, float]:
        return eviction_rank(self._segment_of(node))


class TierCache(BasePrefixCache):
    """Comes before one of SGLang's radix caches among a class's bases; both have the same entry points."""

    stats: Stats
    all_lenders: list[Any]
    own_lender: Any
    draft_layers: int = 0
    _searches: Container[str] = ()
    _writer = NOBODY
    _ahead = NOTHING_AHEAD
    _alone: bool | None = None

    def reset(self) -> None:
        """A flushed scheduler is idle, but a prefetch may be under way: its pages are given away only once it ended."""
        controller = getattr(self, "cache_controller", None)
        for ack in controller.ack_load_queue if controller is not None else ():
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

    def cache_unfinished_req(self, req: Any, chunked: bool = False, **arguments: Any) -> None:
        with self._writing(req, finished=False):
            super().cache_unfinished_req(req, chunked, **arguments)

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

    def stays_unwritten(self, node: Any) -> bool:
        """Marks whose tokens a found or new node holds; whether this request's finding it must not write it.

        A fork that finds its prefix is a hit there like any other; what it adds itself is not written.
        """
        source, search, finished = self._writer
        owner = getattr(node, MARK, None)
        if owner is None or (owner[0] is Source.FORK and source is not Source.FORK):
            setattr(node, MARK, (source, search))
            return destination(source, finished) is Destination.DROP
        return owner[0] is Source.FORK

    def mark_answer(self, node: Any) -> None:
        """A new node of a fork is the fork's."""
        if self._writer.source is Source.FORK:
            setattr(node, MARK, (self._writer.source, self._writer.search))

    def _count_hits(self, req: Any) -> None:
        if req._cache_breakdown_computed and not getattr(req, COUNTED, False):
            setattr(req, COUNTED, True)
            self.stats.add("hit_tokens_device", req.cached_tokens_device)
            self.stats.add("hit_tokens_tier", req.cached_tokens_host)
            self.stats.add("hit_tokens_storage", req.cached_tokens_storage)

    # ---- loads

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

    def spare_window(self, running: int) -> int:
        """Tokens of a sliding window's own KV that loads before admission may take: without a window, any number.

        `running`: requests, each of which may still ask for a window and the pages that it grows into.
        """
        return sys.maxsize

    def _agree(self, values: list[int], operation: Any) -> list[int]:
        if self._alone is None:
            self._alone = self._is_alone()
        if self._alone:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        self._all_reduce(tensor, operation)
        return [int(value) for value in tensor]

    def _is_alone(self) -> bool:
        """Whether there is no other rank to agree with: SGLang's reduction would return what it is given."""
        groups = [getattr(self, name, None) for name in ("tp_group", "attn_cp_group", "attn_tp_group")]
        sizes = [torch.distributed.get_world_size(group=group) for group in groups if group is not None]
        ranks = [getattr(self, name, 1) for name in ("tp_world_size", "pp_size")]
        return max(sizes + ranks) == 1


def copy_mark(node: Any, of: Any) -> None:
    """A part that is split off belongs to whom the whole did."""
    if hasattr(of, MARK):
        setattr(node, MARK, getattr(of, MARK))

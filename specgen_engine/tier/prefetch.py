"""Prefixes of waiting requests, fetched from the tier before they are admitted.

A request waits because the batch is full, a prompt is being computed in chunks, or forks are held back. Its restore
would otherwise begin when it is admitted and be part of its time to first token. What may be fetched is `policy`'s
affair; loading is HiCache's own: the operation, load stream and lock of a restore at admission, in no batch. Decisions
rest on what tensor-parallel ranks have alike: the queue, the tree, counts of free KV, steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from specgen_engine import versions
from specgen_engine.protocol import is_fork
from specgen_engine.tier.policy import Waiting, prefetches, spare_tokens

LOOKED_AT = 16  # requests of the queue whose prefixes are looked up
LOOK_AGAIN = 16  # steps until a request that was looked up is looked up once more


class Prefetcher:
    """Of one scheduler.

    Args:
        cache: a TierCache.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._step = 0
        self._looked: dict[str, int] = {}

    def step(self, queue: Sequence[Any], promised: int, running: int = 0) -> int:
        """After a step's admissions: start fetching for those still in the queue; returns the tokens on their way.

        Args:
            queue: requests that wait, in order.
            promised: tokens that running requests may still ask for.
            running: how many they are.
        """
        self._step += 1
        cache = self._cache
        # One load at a time: SGLang's layer events are a ring of three, two of which batches may need meanwhile.
        if cache.ongoing_load_back or cache.cache_controller.load_queue:
            return 0
        allocator = cache.token_to_kv_pool_allocator
        unread = cache.unread_tokens()
        free, kept = int(allocator.available_size()) + unread, int(cache.evictable_size()) - unread
        spare = min(spare_tokens(free, kept, promised), cache.spare_window(running))
        by_rid = {str(req.rid): req for req in queue[:LOOKED_AT]}
        due = self._due(by_rid) if spare else []
        if not due:
            return 0
        waiting = [Waiting(rid, is_fork(rid), self._match(by_rid[rid]).host_hit_length) for rid in due]
        matches = (self._match(by_rid[rid]) for rid in prefetches(waiting, spare))
        return int(cache.fetch_ahead(matches, spare))

    def _due(self, by_rid: dict[str, Any]) -> list[str]:
        self._looked = {rid: step for rid, step in self._looked.items() if rid in by_rid}
        storing = self._cache.ongoing_prefetch  # these are being fetched from storage into the tier
        due = [rid for rid in by_rid if self._step >= self._looked.get(rid, 0) and rid not in storing]
        self._looked |= dict.fromkeys(due, self._step + LOOK_AGAIN)
        return due

    def _match(self, req: Any) -> Any:
        ids = (req.origin_input_ids + req.output_ids)[:-1]  # the last token is always computed
        return self._cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, req.extra_key)))


def promised_tokens(reqs: Iterable[Any], chunked: Any, ratio: float) -> int:
    """What running requests may still ask for: the rest of a prompt that is computed in chunks, and new tokens.

    Args:
        reqs: those that run, with those that were just admitted.
        chunked: the request whose prompt is computed in chunks, or None.
        ratio: share of their new tokens that SGLang expects them to use; forks are short and use all of them.
    """
    alive = {req.rid: req for req in (*reqs, *([chunked] if chunked is not None else [])) if not req.finished()}
    tokens = sum(
        (req.sampling_params.max_new_tokens - len(req.output_ids)) * (1.0 if is_fork(str(req.rid)) else ratio)
        for req in alive.values()
    )
    prompt = len(chunked.origin_input_ids) - len(chunked.prefix_indices) if chunked is not None else 0
    return int(tokens) + prompt


def after_admissions(scheduler: Any, batch: Any, running: Any) -> None:
    """At the end of a step's admissions; nothing where the radix cache is not the tier's, or layers are pipelined."""
    prefetcher = getattr(scheduler.tree_cache, "prefetcher", None)
    if prefetcher is None or versions.current().parallel(scheduler).pp_size > 1:
        return
    reqs = [*running.reqs, *(batch.reqs if batch is not None else ())]
    promised = promised_tokens(reqs, scheduler.chunked_req, scheduler.new_token_ratio_tracker.current)
    prefetcher.step(scheduler.waiting_queue, promised, len(reqs))

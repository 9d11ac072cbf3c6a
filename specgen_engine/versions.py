"""The one table of what differs between SGLang releases; one that the suite has not passed on is refused.

A row is marked tested when `make test-latest` has passed on its release. What moved in a newer one is said by
`python -m specgen_engine.plugin --check-wheel`, before any of it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version as installed
from typing import Any, Protocol

ALLOW = "SPECGEN_ALLOW_SGLANG"
Signature = tuple[str, ...]


class RequestKv(Protocol):
    """How a release keeps the KV of a running request (managers/schedule_batch.py, mem_cache/)."""

    def held(self, req: Any) -> bool:
        """Whether the request holds KV of its own."""

    def committed(self, req: Any) -> int:
        """Tokens whose KV is computed, or in flight on the stream that later readers use."""

    def in_tree(self, req: Any) -> int:
        """Tokens of it that the radix tree owns."""

    def released(self, req: Any) -> int:
        """Tokens at its front that have left the sliding window and whose uncompressed keys are freed."""

    def publish(self, req: Any, length: int, tree_cache: Any) -> None:
        """Insert the first `length` tokens into the radix tree; the request goes on as before."""

    def release(self, batch: Any, index: int, server_args: Any) -> None:
        """Free the KV of request `index` of a decode batch, as SGLang's own retraction does."""


class FillRangeKv:
    """0.5.17: the tree caches a request's fill range; it is set to the length wanted and put back."""

    def held(self, req: Any) -> bool:
        return req.req_pool_idx is not None and req.extend_range is not None

    def committed(self, req: Any) -> int:
        return int(req.kv_committed_len)

    def in_tree(self, req: Any) -> int:
        return int(req.cache_protected_len)

    def released(self, req: Any) -> int:
        return int(req.kv.swa_evicted_seqlen)

    def publish(self, req: Any, length: int, tree_cache: Any) -> None:
        req._refresh_fill_ids()
        extend_range = req.extend_range
        try:
            req.set_extend_range(extend_range.start, length)
            tree_cache.cache_unfinished_req(req)
        finally:
            req.extend_range = extend_range

    def release(self, batch: Any, index: int, server_args: Any) -> None:
        batch.release_req(index, len(batch.reqs) - 1, server_args)


class CheckpointKv:
    """0.5.23: KV lengths moved to req.kv, and the tree publishes a prefix by itself (BasePrefixCache.checkpoint)."""

    def held(self, req: Any) -> bool:
        return bool(req.kv.holds_kv)

    def committed(self, req: Any) -> int:
        return int(req.kv.kv_committed_len)

    def in_tree(self, req: Any) -> int:
        return int(req.kv.cache_protected_len)

    def released(self, req: Any) -> int:
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        return int(req.kv.get_evicted_seqlen(ComponentType.SWA))

    def publish(self, req: Any, length: int, tree_cache: Any) -> None:
        req.refresh_fill_ids()
        tree_cache.checkpoint(req, up_to=length)

    def release(self, batch: Any, index: int, server_args: Any) -> None:
        batch.release_req(index, len(batch.reqs) - 1)


def parallel_of_scheduler(scheduler: Any) -> Any:
    return scheduler.ps


def parallel_of_process(scheduler: Any) -> Any:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


BATCH = "sglang.srt.managers.schedule_batch"

# What we call beside the hooks, in every release: SGLang's function and its parameters.
CALLED: Mapping[str, Signature] = {
    f"{BATCH}.ScheduleBatch.filter_batch": ("self", "chunked_req_to_exclude", "keep_indices"),
    f"{BATCH}.ScheduleBatch.release_req": ("self", "idx", "remaing_req_count", "server_args"),
    f"{BATCH}.Req.finished": ("self",),
    f"{BATCH}.Req._refresh_fill_ids": ("self",),
    f"{BATCH}.Req.set_extend_range": ("self", "start", "end"),
    "sglang.srt.mem_cache.radix_cache.RadixCache.cache_unfinished_req": ("self", "req", "chunked"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._dispatch_to_scheduler": ("self", "obj"),
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request": ("self", "rid", "abort_all"),
    "sglang.srt.managers.io_struct.hook_custom_types": ("new_types",),
    "sglang.srt.plugins.hook_registry.HookRegistry.register": ("cls", "target", "hook", "hook_type", "source"),
    "sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks": ("cls",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Release:
    """What a release differs in. `moved` overrides what a hook or CALLED expects; None: not called there.

    parallel: where a scheduler's ranks and sizes are kept (tp_rank, pp_size).
    kv_tier: whether it has HiRadixCache, which the remote KV tier is built on.
    tested: the whole suite has passed on it. Without that it is served only where the operator allows it.
    """

    version: str
    kv: RequestKv
    moved: Mapping[str, Signature | None] = field(default_factory=dict)
    parallel: Callable[[Any], Any] = parallel_of_scheduler
    kv_tier: bool = True
    tested: bool = True


RELEASES: tuple[Release, ...] = (
    Release("0.5.17", FillRangeKv()),
    Release(
        "0.5.23",
        CheckpointKv(),
        {
            f"{BATCH}.ScheduleBatch._get_decode_retraction_order": ("reqs",),
            f"{BATCH}.ScheduleBatch.filter_batch": ("self", "reqs_to_exclude", "keep_indices"),
            f"{BATCH}.ScheduleBatch.release_req": ("self", "idx", "remaing_req_count", "offload_kv"),
            f"{BATCH}.Req._refresh_fill_ids": None,
            f"{BATCH}.Req.set_extend_range": None,
            "sglang.srt.mem_cache.radix_cache.RadixCache.cache_unfinished_req": None,
            f"{BATCH}.Req.refresh_fill_ids": ("self",),
            "sglang.srt.mem_cache.kv_cache_builder.maybe_register_hicache_draft": ("tree_cache", "draft_plan"),
            "sglang.srt.mem_cache.radix_cache.RadixCache.checkpoint": ("self", "req", "up_to"),
        },
        parallel_of_process,
        kv_tier=False,
        tested=False,
    ),
)  # fmt: skip


def sglang_version() -> str:
    return installed("sglang")


def is_tested(version: str) -> bool:
    return any(release.version == version and release.tested for release in RELEASES)


def release_of(version: str) -> Release:
    """The table's row for a version: its own, else the newest one that is not newer, else the oldest."""
    older = [release for release in RELEASES if _key(release.version) <= _key(version)]
    return max(older or RELEASES[:1], key=lambda release: _key(release.version))


@cache
def current() -> Release:
    return release_of(sglang_version())


def expected(target: str, signature: Signature, release: Release) -> Signature | None:
    """What `target` takes in a release; `signature` is what it takes where nothing moved. None: not called there."""
    return release.moved.get(target, signature)


def refusal(version: str, moved: list[str], environ: Mapping[str, str] = os.environ) -> str | None:
    """Why a release may not be served, or None: it is in the table, or the operator allows this very version.

    `moved` are the hooks that don't fit it, one line each.
    """
    if is_tested(version) or environ.get(ALLOW) == version:
        return None
    tested = ", ".join(release.version for release in RELEASES if release.tested)
    hooks = (
        "hooks that moved: " + "; ".join(moved) if moved else "every hook's signature fits, its behaviour is untested"
    )
    return (
        f"SGLang {version} is none of the releases that SpecGen engine is tested on ({tested}): {hooks}. "
        f"Install one of these, or set {ALLOW}={version} to try it"
    )


def tier_refusal(release: Release) -> str | None:
    """Why the remote KV tier can't be had on a release, or None."""
    if release.kv_tier:
        return None
    able = ", ".join(one.version for one in RELEASES if one.kv_tier)
    return (
        f"SGLang {release.version} has no HiRadixCache, which the remote KV tier is built on: use off, or SGLang {able}"
    )


def _key(version: str) -> tuple[int, ...]:
    numbers = version.split("+")[0].replace(".post", ".").split(".")
    return tuple(int(number) for number in numbers if number.isdigit())

"""The tier's hooks: arguments in the parent, the radix cache and its state in each scheduler."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from specgen_engine.config import KvConfig, SpecGenConfig
from specgen_engine.tier.base import STAGED_STORAGE, TierError
from specgen_engine.tier.start import usable_lenders

logger = logging.getLogger(__name__)

REMOTE = ("peer", "loopback")


def prepare_arguments(args: argparse.Namespace, settings: SpecGenConfig) -> SpecGenConfig:
    """Switch HiCache on for a tier; the settings as they will be: a fallback is chosen here, in the parent, and said.

    Raises TierError for arguments that do not go together, and when no lender is usable and no fallback is given.
    """
    kv = settings.kv
    if kv.tier == "off":
        return settings
    if kv.tier in REMOTE:
        _refuse_arguments(args, kv)
        if kv.tier == "peer" or kv.directory is not None:
            kv = _with_lenders(kv)
    if kv.tier != "off":
        args.enable_hierarchical_cache = True
    return settings.model_copy(update={"kv": kv})


def remember_draft(result: Any, scheduler: Any) -> Any:
    """After the workers are made: the draft's pool, for the radix cache, which is made without the draft's worker."""
    if _is_remote(scheduler.server_args) and scheduler.draft_worker is not None:
        from sglang.srt.mem_cache.kv_cache_builder import get_draft_kv_pool

        from specgen_engine.tier.drafts import remember

        pool = get_draft_kv_pool(
            draft_worker=scheduler.draft_worker,
            spec_algorithm=scheduler.spec_algorithm,
            server_args=scheduler.server_args,
        )
        remember(scheduler.tp_worker, pool)
    return result


def register_draft(original: Callable[..., None], **arguments: Any) -> None:
    """Around SGLang's pool of pinned host memory for the draft's KV beside HiCache: it is in a remote tier's pages."""
    if not _is_remote(arguments.get("server_args")):
        original(**arguments)


def _is_remote(server_args: Any) -> bool:
    settings: SpecGenConfig | None = getattr(server_args, "__dict__", {}).get("specgen")
    return settings is not None and settings.kv.tier in REMOTE


def radix_cache(original: Callable[[Any], Any], ctx: Any) -> Any:
    """Around SGLang's default choice of a radix cache: ours when the tier is peer or loopback."""
    if not _is_remote(ctx.server_args):
        return original(ctx)
    from specgen_engine.tier.build import build_cache

    try:
        return build_cache(ctx, ctx.server_args.__dict__["specgen"].kv, original)
    except TierError as error:
        print(f"specgen: {error}", file=sys.stderr, flush=True)
        raise


def prefetch(result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """After a step's admissions: prefixes of requests that still wait are fetched from the tier."""
    if scheduler.waiting_queue and _has_tier(scheduler):
        from specgen_engine.tier.prefetch import after_admissions

        after_admissions(scheduler, *result)


def internal_state(result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    """`specgen_kv` in /server_info: counts, and the books of arena and pool, recounted."""
    if not _has_tier(scheduler):
        return result
    from specgen_engine.tier.build import describe

    if (state := describe(scheduler)) is not None:
        result.internal_state["specgen_kv"] = state
    return result


def _has_tier(scheduler: Any) -> bool:
    """Asked before anything of the tier is imported: not every release has what it is built on."""
    return hasattr(scheduler.tree_cache, "prefetcher")


def _with_lenders(kv: KvConfig) -> KvConfig:
    usable, refusals = usable_lenders(kv)
    if usable:
        return kv
    reason = "; ".join(f"{name}: {why}" for name, why in refusals.items()) or "no socket there"
    if kv.fallback == "refuse":
        raise TierError(
            f"--specgen-kv {kv.tier}: no usable lender in {kv.socket_directory} ({reason}): start one with "
            "`specgen lend`, or give --specgen-kv-fallback host or off"
        )
    logger.warning("--specgen-kv %s: no usable lender (%s): falling back to %s", kv.tier, reason, kv.fallback)
    return kv.model_copy(update={"tier": kv.fallback})


def _refuse_arguments(args: argparse.Namespace, kv: KvConfig) -> None:
    storage = getattr(args, "hicache_storage_backend", None)
    if storage is not None and storage not in STAGED_STORAGE:
        raise TierError(
            f"--hicache-storage-backend {storage} reads the host pool's memory, and the remote KV tier has none: "
            f"use {' or '.join(STAGED_STORAGE)}, which is staged through host memory, or --specgen-kv host"
        )
    if getattr(args, "hicache_write_policy", "write_through") == "write_back":
        raise TierError(f"--hicache-write-policy write_back with --specgen-kv {kv.tier}: use write_through")
    if kv.tier == "peer" and getattr(args, "device", None) == "cpu":
        raise TierError("--specgen-kv peer needs a GPU, and this server runs on the CPU: use loopback")

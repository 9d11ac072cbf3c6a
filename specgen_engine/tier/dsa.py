"""GLM-5's pool (sparse attention): a latent and an index key a token, both moved as one page.

SGLang gives such a model a controller with two host pools, one for the latent and one beside it for the index. A page
in the arena is made of planes of any buffers, so one pool holds both, and tags, revocation and losses are those of MHA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.mem_cache import hiradix_cache

from specgen_engine.errors import HookError
from specgen_engine.tier.base import PageShape, TierError, plane_of, register_pool
from specgen_engine.tier.cache import TierController

POOL = "DSATokenToKVPool"
ATTACH = "attach_hybrid_dsa_pool_to_hiradix_cache"


def planes_of(pool: Any, page_size: int) -> PageShape:
    """Two planes a layer: the latent's rows, and the index's row of a page (64 keys of fp8, then their scales).

    Raises TierError for a pool whose layers are split over ranks, or whose index pages are not the latent's.
    """
    if pool.layer_shard_enabled:
        raise TierError("--specgen-kv: a DSA pool sharded by layers is not supported: use --specgen-kv host or off")
    if pool.page_size != page_size or pool.index_buf_size != pool.size:
        raise TierError(
            f"--page-size {page_size}: the index has pages of {pool.page_size} tokens of {pool.size}: use 64"
        )
    layers = zip(pool.kv_buffer, pool.index_k_with_scale_buffer, strict=True)
    return PageShape(
        [plane for latent, index in layers for plane in (plane_of(latent, page_size), plane_of(index, 1))], 2, page_size
    )


@contextmanager
def attached(pool: Any) -> Iterator[None]:
    """While HiRadixCache sets itself up, it gets our one pool where it would make two."""
    if not hasattr(hiradix_cache, ATTACH):
        raise HookError(f"SGLang's hiradix_cache has no {ATTACH}: the remote KV tier does not fit GLM-5 there")
    before = getattr(hiradix_cache, ATTACH)

    def attach(
        cache: Any, params: Any, server_args: Any, *, extra_config: Any, prefetch_threshold: int,
        enable_storage_metrics: bool, load_cache_event: Any,
    ) -> None:  # fmt: skip
        cache.token_to_kv_pool_host = cache.full_kv_pool_host = pool
        cache.cache_controller = TierController(
            params.token_to_kv_pool_allocator,
            pool,
            cache.page_size,
            cache.tp_group,
            load_cache_event=load_cache_event,
            attn_cp_group=cache.attn_cp_group,
            attn_tp_group=cache.attn_tp_group,
            pp_group=cache.pp_group,
            write_policy=server_args.hicache_write_policy,
            io_backend=server_args.hicache_io_backend,
            storage_backend=server_args.hicache_storage_backend,
            prefetch_threshold=prefetch_threshold,
            model_name=server_args.served_model_name,
            storage_backend_extra_config=extra_config,
            enable_storage_metrics=enable_storage_metrics,
        )

    setattr(hiradix_cache, ATTACH, attach)
    try:
        yield
    finally:
        setattr(hiradix_cache, ATTACH, before)


def register() -> None:
    """Let the tier serve GLM-5's pool."""
    register_pool(POOL, planes_of)

"""GLM-5's pool, SGLang's own class on a CPU: latent and index of a page go out and come back, byte for byte.

With its MTP layer, whose pool SGLang's draft worker has, and without.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specgen_engine.kv.native import _kv
from specgen_engine.tier.base import TierError, page_shape
from specgen_engine.tier.drafts import kept_beside, remember
from specgen_engine.tier.probe import buffers_of, probe
from tests.tier import support

PAGE = 64
PAGES = [5, 1, 6, 3, 2]


def dsa_pool(*_args: Any, tokens: int = 512, dtype: torch.dtype = torch.bfloat16, layers: int = 3) -> Any:
    """Layers of GLM-5's widths; 576 values of a latent, or 656 bytes of it in fp8."""
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    return DSATokenToKVPool(
        size=tokens,
        page_size=PAGE,
        kv_lora_rank=512,
        dtype=dtype,
        qk_rope_head_dim=64,
        layer_num=layers,
        device="cpu",
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=656 if dtype == support.FP8 else 576,
    )


@pytest.fixture(
    params=[(torch.bfloat16, 0), (support.FP8, 0), (torch.bfloat16, 1), (support.FP8, 1)],
    ids=["bfloat16", "fp8", "bfloat16 with MTP", "fp8 with MTP"],
)
def glm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import specgen_engine.tier.build  # the pool is registered where the tier is put together

    assert specgen_engine.tier.build.dsa.POOL == "DSATokenToKVPool"
    dtype, drafts = request.param
    worker = SimpleNamespace()
    draft = dsa_pool(dtype=dtype, layers=drafts) if drafts else None
    remember(worker, draft)
    monkeypatch.setattr(support, "device_pool", lambda *_args: dsa_pool(dtype=dtype))
    monkeypatch.setattr(support, "page_shape", lambda pool, size: kept_beside(page_shape(pool, size), pool, worker)[0])
    with support.tier(tmp_path, "dsa", PAGE, dtype) as one:
        one.draft = draft
        yield one


def pools_of(one: Any) -> list[Any]:
    return [one.device, one.draft] if one.draft is not None else [one.device]


def fill(one: Any, seed: int) -> None:
    for pool in pools_of(one):
        support.fill(pool, seed + pool.layer_num)


def wipe(one: Any) -> None:
    for buffer in (buffer for pool in pools_of(one) for buffer in buffers_of(pool)):
        buffer.zero_()


def rows(one: Any, page: int) -> list[torch.Tensor]:
    """A page's bytes in each buffer: 64 rows of a latent, one of an index."""
    return [
        buffer[page * size : (page + 1) * size].view(torch.uint8).clone()
        for pool in pools_of(one)
        for buffer, size in zip(buffers_of(pool), [PAGE, 1] * pool.layer_num, strict=True)
    ]


def test_latent_and_index_come_back_byte_for_byte(glm: Any) -> None:
    assert probe(glm.device, glm.pool.shape, glm.arena, glm.draft).pages >= 1
    assert glm.pool.layer_num == 3
    fill(glm, 3)
    wanted = [rows(glm, page) for page in PAGES]
    indices = glm.write(PAGES)
    wipe(glm)
    assert glm.read(indices, PAGES[::-1]) == len(PAGES)
    for page, expected in zip(PAGES[::-1], wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows(glm, page), expected, strict=True))
    assert all(int(row.sum()) == 0 for row in rows(glm, 7))
    glm.pool.free(indices)
    assert glm.pool.check_integrity()["used"] == 0


def test_pages_survive_a_lender_that_takes_its_memory_back(glm: Any) -> None:
    fill(glm, 4)
    wanted = [rows(glm, page) for page in PAGES[:2]]
    indices = glm.write(PAGES[:2])
    (epoch,) = glm.own[0].epochs().values()
    glm.own[0].revoke(epoch, bound_s=2.0)
    assert len(glm.pool.lost_pages()) == 0
    assert glm.read(indices, [3, 4]) == 2
    for page, expected in zip([3, 4], wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows(glm, page), expected, strict=True))


def test_bytes_a_token_are_the_latents_and_the_indexs() -> None:
    import specgen_engine.tier.build  # noqa: F401

    shape = page_shape(dsa_pool(), PAGE)
    assert shape.layers == 3
    assert shape.page_bytes / PAGE / 3 == 576 * 2 + 128 + 4
    assert page_shape(dsa_pool(dtype=support.FP8), PAGE).page_bytes / PAGE / 3 == 656 + 128 + 4


def test_layouts_that_do_not_fit_are_refused() -> None:
    from specgen_engine.tier.dsa import planes_of

    with pytest.raises(TierError, match="use 64"):
        planes_of(dsa_pool(), 32)
    sharded = dsa_pool()
    sharded.layer_shard_enabled = True
    with pytest.raises(TierError, match="sharded"):
        planes_of(sharded, PAGE)


def test_sglangs_radix_cache_gets_our_pool_where_it_would_make_two() -> None:
    from sglang.srt.mem_cache import hiradix_cache

    from specgen_engine.tier.dsa import ATTACH, attached

    before = getattr(hiradix_cache, ATTACH)
    with attached(_kv):
        assert getattr(hiradix_cache, ATTACH) is not before
    assert getattr(hiradix_cache, ATTACH) is before


def test_the_radix_cache_evicts_restores_and_accounts_for_latent_and_index(glm: Any, tmp_path: Path) -> None:
    """SGLang's HiRadixCache, as a server makes it: 4 pages published, evicted, restored elsewhere, byte for byte."""
    import torch.distributed as dist
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InitLoadBackParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from specgen_engine.tier.dsa import attached

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with attached(glm.pool):
            cache = support.radix_cache(glm, dist.group.WORLD)
        assert cache.pool is glm.pool
        key = RadixKey(list(range(4 * PAGE)), None)
        fill(glm, 5)
        indices = cache.token_to_kv_pool_allocator.alloc(4 * PAGE)
        pages = (indices[::PAGE] // PAGE).tolist()
        wanted = [rows(glm, page) for page in pages]
        cache.insert(InsertParams(key=key, value=indices))
        cache.check_hicache_events()
        cache.evict(EvictParams(num_tokens=4 * PAGE))
        wipe(glm)
        found = cache.match_prefix(MatchPrefixParams(key=key))
        assert (len(found.device_indices), found.host_hit_length) == (0, 4 * PAGE)
        loaded, _ = cache.init_load_back(InitLoadBackParams(found.best_match_node, found.host_hit_length))
        cache.ready_to_load_host_cache()
        cache.check_hicache_events()
        for page, expected in zip((loaded[::PAGE] // PAGE).tolist(), wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(rows(glm, page), expected, strict=True))
        cache.reset()
        assert cache.pool.check_integrity()["used"] == 0
    finally:
        dist.destroy_process_group()

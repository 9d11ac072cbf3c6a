"""Fork points in SGLang's UnifiedRadixCache with a sliding window, mid-decode: DeepSeek-V4's tree, on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specgen_engine.scheduler.fork_point import insert_fork_point
from tests.tier import support  # noqa: F401  (as SGLang's CPU engine is started)

PAGE, WINDOW, POOL = 16, 8, 512


class Req(SimpleNamespace):
    def _refresh_fill_ids(self) -> None: ...

    def set_extend_range(self, start: int, end: int) -> None:
        self.extend_range = SimpleNamespace(start=start, end=end)

    def get_fill_ids(self) -> list[int]:
        return (self.origin_input_ids + self.output_ids)[: self.extend_range.end]


@pytest.fixture
def tree() -> Any:
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    pool = SWAKVPool(POOL, POOL, PAGE, torch.float32, 1, 8, [0], [1], "cpu", enable_memory_saver=False)
    allocator = SWATokenToKVPoolAllocator(POOL, POOL, PAGE, torch.float32, "cpu", pool, False)
    requests = ReqToTokenPool(4, POOL, "cpu", False)
    params = CacheInitParams(
        False, requests, allocator, PAGE, sliding_window_size=WINDOW,
        tree_components=(ComponentType.FULL, ComponentType.SWA),
    )  # fmt: skip
    return UnifiedRadixCache(params)


def running(tree: Any, tokens: int, slot: int = 1) -> Req:
    """A request that has decoded `tokens` tokens and published none."""
    allocator = tree.token_to_kv_pool_allocator
    size = -(-tokens // PAGE) * PAGE  # its own alloc needs Triton for pages above 1
    indices, window = allocator.full_attn_allocator.alloc(size), allocator.swa_attn_allocator.alloc(size)
    assert indices is not None
    assert window is not None
    allocator.set_full_to_swa_mapping(indices, window)
    tree.req_to_token_pool.write((slot, slice(0, len(indices))), indices.to(torch.int32))
    lock = tree.inc_lock_ref(tree.root_node_handle())
    return Req(
        rid="base", origin_input_ids=list(range(100, 110)), output_ids=list(range(200, 190 + tokens)), extra_key=None,
        req_pool_idx=slot, kv_committed_len=tokens, cache_protected_len=0, last_node=tree.root_node_handle(),
        swa_uuid_for_lock=lock.swa_uuid_for_lock, skip_lock_node_ids=lock.skip_lock_node_ids, prefix_indices=[],
        swa_prefix_lock_released=False, priority=0, extend_range=SimpleNamespace(start=0, end=10), session=None,
        kv=SimpleNamespace(swa_evicted_seqlen=0, kv_allocated_len=len(indices)),
    )  # fmt: skip


def found(tree: Any, req: Req, tokens: int) -> int:
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    key = RadixKey((req.origin_input_ids + req.output_ids)[:tokens], None)
    return len(tree.match_prefix(MatchPrefixParams(key=key)).device_indices)


def accounts(tree: Any) -> tuple[int, int]:
    """Tokens of each kind that are free, evictable or protected."""
    allocator = tree.token_to_kv_pool_allocator
    full = allocator.full_available_size() + tree.full_evictable_size() + tree.full_protected_size()
    return full, allocator.swa_available_size() + tree.swa_evictable_size() + tree.swa_protected_size()


def test_a_prefix_is_found_up_to_its_boundary_again_and_again_and_nothing_leaks(tree: Any) -> None:
    whole = accounts(tree)
    req = running(tree, 75)
    for asked, boundary in ((10, 0), (33, 32), (40, 32), (75, 64)):
        assert insert_fork_point(req, asked, tree) == boundary
        assert found(tree, req, 75) == boundary
    tree.sanity_check()
    tail = -(-75 // PAGE) * PAGE - 64
    assert accounts(tree) == (whole[0] - tail, whole[1] - tail), "only the page that is not full is the request's own"
    tree.cache_finished_req(req, kv_len_to_handle=75)
    tree.sanity_check()
    assert tree.full_protected_size() == tree.swa_protected_size() == 0
    assert accounts(tree) == whole


def test_a_boundary_whose_window_is_gone_is_not_published(tree: Any) -> None:
    """Otherwise SGLang would own pages in the tree that the request still counts as its own."""
    req = running(tree, 75)
    assert insert_fork_point(req, 33, tree) == 32
    slots = tree.req_to_token_pool.req_to_token[1, 32:64]
    tree.token_to_kv_pool_allocator.free_swa(slots.to(torch.int64))
    req.kv.swa_evicted_seqlen = 64
    assert insert_fork_point(req, 75, tree) == 32
    assert found(tree, req, 75) == 32
    assert tree.full_evictable_size() + tree.full_protected_size() == 32, "the tree owns no page twice"
    tree.sanity_check()

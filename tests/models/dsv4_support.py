"""SGLang's own DeepSeek-V4 pool, allocators and UnifiedRadixCache on a CPU, over arenas in shared memory.

The pool is SGLang's class as it is, of real widths, three layers: window only, blocks of 4, blocks of 128. Its three
settings of a server are given here. The allocator's growth by tokens is a Triton kernel, so that whole pages are taken
from SGLang's two page allocators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from specgen_engine.config import KvConfig
from specgen_engine.kv.base import Backend
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from tests.tier import support  # noqa: F401  (as SGLang's CPU engine is started)

PAGE, WINDOW = 256, 128
RATIOS = (0, 4, 128)
MIB = 1 << 20


@contextmanager
def settings_of_a_server() -> Iterator[None]:
    """What the pool asks the process' server for, while it is made."""
    from sglang.srt.mem_cache import deepseek_v4_memory_pool as module

    given = {
        "get_server_args": lambda: None,
        "get_spec": lambda: SimpleNamespace(speculative_algorithm=None),
        "get_exec": lambda: SimpleNamespace(kernel=SimpleNamespace(enable_deepseek_v4_fp4_indexer=False)),
    }
    before = {name: getattr(module, name) for name in given}
    for name, value in given.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def device_pool(pages: int, window_pages: int, ratios: tuple[int, ...] = RATIOS, **given: Any) -> Any:
    """Of so many pages of 256 tokens, besides the one that nobody owns."""
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    arguments: dict[str, Any] = {
        "max_num_reqs": 4, "swa_size": window_pages * PAGE, "c4_size": pages * PAGE // 4, "c128_size": pages * 2,
        "c4_state_pool_size": (window_pages + 1) * 8, "c128_state_pool_size": 0, "page_size": PAGE,
        "swa_page_size": PAGE,
        "dtype": torch.float8_e4m3fn, "c4_state_dtype": torch.float32, "c128_state_dtype": torch.float32,
        "qk_nope_head_dim": 448, "qk_rope_head_dim": 64, "indexer_head_dim": 128, "layer_num": len(ratios),
        "device": "cpu", "enable_memory_saver": False, "compression_ratios": list(ratios), "sliding_window": WINDOW,
        "start_layer": 0, "end_layer": len(ratios),
    }  # fmt: skip
    with settings_of_a_server():
        return DeepSeekV4TokenToKVPool(**{**arguments, **given})


def bytes_of(space: Any, page: int) -> list[torch.Tensor]:
    """A page's bytes in each buffer of an index space, one view a plane."""
    return [
        buffer.view(torch.uint8).reshape(-1)[page * plane.bytes : (page + 1) * plane.bytes]
        for buffer, plane in zip(space.tier_buffers, space.shape.planes, strict=True)
    ]


def stamp(space: Any, page: int, value: int) -> None:
    """Bytes that tell the page's value and its plane, and that no two pages share."""
    for number, row in enumerate(bytes_of(space, page)):
        row.copy_(pattern(len(row), value, number))


def pattern(size: int, value: int, number: int) -> torch.Tensor:
    words = torch.arange(size // 8, dtype=torch.int64) * 2_654_435_761 + value * 1_000_003 + number * 97
    return words.view(torch.uint8)


def holds(space: Any, page: int, value: int) -> bool:
    rows = enumerate(bytes_of(space, page))
    return all(torch.equal(row.cpu(), pattern(len(row), value, number)) for number, row in rows)


@dataclass
class Setting:
    """A cache with its two parts, and the lenders of this test."""

    cache: Any
    own: list[Lender]

    @property
    def allocator(self) -> Any:
        return self.cache.token_to_kv_pool_allocator

    @property
    def spaces(self) -> tuple[Any, Any]:
        return self.cache.parts.tokens.space, self.cache.parts.window.space

    @property
    def pools(self) -> tuple[Any, Any]:
        return self.cache.parts.tokens.pool, self.cache.parts.window.pool

    def take(self, tokens: int) -> torch.Tensor | None:
        """Device indices of whole pages with a window page each, as a prefill's; None when there is no room."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        one = self.allocator
        short = max(0, tokens - one.full_available_size()), max(0, tokens - one.swa_available_size())
        if any(short):
            self.cache.evict(EvictParams(num_tokens=short[0], swa_num_tokens=short[1]))
        if min(one.full_available_size(), one.swa_available_size()) < tokens:
            return None
        indices, window = one.full_attn_allocator.alloc(tokens), one.swa_attn_allocator.alloc(tokens)
        one.set_full_to_swa_mapping(indices, window)
        return torch.as_tensor(indices)

    def window_of(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.allocator.translate_loc_from_full_to_swa(indices))

    def books(self) -> None:
        """Of the tree, as SGLang checks them; of both arenas; of the device: free + evictable + protected = all."""
        cache, one = self.cache, self.allocator
        cache.sanity_check()
        for pool in self.pools:
            pool.check_integrity()
        full = one.full_available_size() + cache.full_evictable_size() + cache.full_protected_size()
        window = one.swa_available_size() + cache.swa_evictable_size() + cache.swa_protected_size()
        assert (full, window) == (one.size_full, one.size_swa)
        for pool, component in zip(self.pools, cache.components, strict=True):
            held = [node.component_data[component].host_value for node in cache.tree_core._collect_all_nodes()]
            slots = torch.cat([*(copy for copy in held if copy is not None), torch.empty(0, dtype=torch.int64)])
            assert len(slots.unique()) == len(slots), "a logical page belongs to two nodes"
            assert int(pool.slot_used.sum()) == len(slots), "a logical page belongs to nobody"
            assert bool(pool.slot_used[slots].all())


@contextmanager
def setting(
    folder: Path,
    group: Any,
    pages: int = 24,
    window_pages: int = 16,
    chunks: tuple[int, ...] = (16,),
    chunk_mib: int = 2,
    device: str = "cpu",
) -> Iterator[Setting]:
    """As a scheduler makes it (tier/build.py), over one lender an entry of `chunks`; on a GPU, another GPU's memory."""
    from sglang.srt.mem_cache.registry import default_radix_cache_factory

    from specgen_engine.tier.build import build_cache

    folder.chmod(0o700)
    lend: Backend = LoopbackBackend() if device == "cpu" else CudaBackend(1)
    own = [Lender(folder, f"lender-{i}", lend, chunk_mib * MIB, count) for i, count in enumerate(chunks)]
    ctx = context(group, pages, window_pages, device)
    kv = KvConfig(tier="loopback" if device == "cpu" else "peer", directory=folder, chunk_mib=chunk_mib)
    cache = build_cache(ctx, kv, default_radix_cache_factory)
    try:
        yield Setting(cache, own)
    finally:
        for lenders in cache.all_lenders:
            lenders.close()
        for lender in own:
            lender.close()


def context(group: Any, pages: int, window_pages: int, device: str = "cpu", **given: Any) -> Any:
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    pool = device_pool(pages, window_pages, device=device)
    allocator = SWATokenToKVPoolAllocator(
        pages * PAGE, window_pages * PAGE, PAGE, torch.float8_e4m3fn, device, pool, False
    )
    requests = ReqToTokenPool(4, pages * PAGE, device, False)
    params = CacheInitParams(False, requests, allocator, PAGE, sliding_window_size=WINDOW, tp_cache_group=group)
    server_args = SimpleNamespace(
        hicache_ratio=2.0, hicache_size=0, hicache_mem_layout="page_first", hicache_storage_backend=None,
        hicache_storage_backend_extra_config=None, hicache_storage_prefetch_policy="timeout",
        hicache_write_policy="write_through", hicache_io_backend="kernel", served_model_name="m",
        extra_metric_labels=None, disable_radix_cache=False, enable_session_radix_cache=False,
    )  # fmt: skip
    vars(server_args).update(given)
    runner = SimpleNamespace(forward_stream=None)
    worker = SimpleNamespace(register_hicache_layer_transfer_counter=lambda _counter: None, model_runner=runner)
    return SimpleNamespace(
        params=params, server_args=server_args, tp_worker=worker, tp_rank=0, tp_size=1, is_hybrid_swa=True,
        is_hybrid_ssm=False, is_dsa=False, enable_hierarchical_cache=True, full_tokens_per_layer=pages * PAGE,
        disable_radix_cache=False, effective_chunked_prefill_size=None,
    )  # fmt: skip


def request(found: Any) -> Any:
    """What a waiting request knows of its match."""
    return SimpleNamespace(
        last_node=found.last_device_node, host_hit_length=found.host_hit_length,
        swa_host_hit_length=found.swa_host_hit_length, mamba_host_hit_length=0, mamba_pool_idx=None,
    )  # fmt: skip


def path(one: Setting, node_id: int) -> list[Any]:
    """The nodes from the first below the root down to one."""
    nodes, node = [], one.cache.tree_core.node_by_id(node_id)
    while node is not one.cache.tree_core.root_node:
        nodes.insert(0, node)
        node = node.parent
    return nodes


class Running(SimpleNamespace):
    """A request that decodes, with what fork points and SGLang's cache ask of it."""

    def _refresh_fill_ids(self) -> None: ...

    def set_extend_range(self, start: int, end: int) -> None:
        self.extend_range = SimpleNamespace(start=start, end=end)

    def get_fill_ids(self) -> list[int]:
        return list((self.origin_input_ids + self.output_ids)[: self.extend_range.end])


def running(one: Setting, ids: list[int], indices: torch.Tensor) -> Running:
    cache = one.cache
    cache.req_to_token_pool.write((1, slice(0, len(indices))), indices.to(torch.int32))
    lock = cache.inc_lock_ref(cache.root_node_handle())
    return Running(
        rid="base", origin_input_ids=ids[:10], output_ids=ids[10:], extra_key=None, req_pool_idx=1,
        kv_committed_len=len(ids), cache_protected_len=0, last_node=cache.root_node_handle(), session=None,
        swa_uuid_for_lock=lock.swa_uuid_for_lock, skip_lock_node_ids=lock.skip_lock_node_ids, prefix_indices=[],
        swa_prefix_lock_released=False, priority=0, extend_range=SimpleNamespace(start=0, end=10),
        kv=SimpleNamespace(swa_evicted_seqlen=0, kv_allocated_len=len(indices)), _cache_breakdown_computed=False,
    )  # fmt: skip

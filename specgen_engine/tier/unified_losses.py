"""Forgetting second-level pages in SGLang's UnifiedRadixCache, the same way on every rank.

A node has tokens' KV and, on its own indices, the window's. Copies of tokens reach from the root without a gap; the
window's may be missing anywhere: SGLang calls that a tombstone, and a prefix is found only where a whole window is left
before its end. What SGLang does when it evicts either from host memory is done here to what was lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.unified_cache.components import CacheTransferPhase, ComponentType, EvictLayer
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import DriveHostEvictionResult

from specgen_engine.tier.losses import path_of, subtree

FULL, WINDOW = ComponentType.FULL, ComponentType.SWA


class Readable(NamedTuple):
    """How many leading pages can be read, of the tokens and of the window that a restore needs."""

    tokens: int
    window: int


def window_chain(core: Any, node: Any) -> list[Any]:
    """The nodes of the window before a node's end whose window only the second level has, outermost first."""
    component = core.components_by_type[WINDOW]
    chain: list[Any] = []
    seen = 0
    while node is not core.root_node and seen < component.sliding_window_size:
        part = node.component_data[WINDOW]
        if part.value is None:
            chain.insert(0, node)
        seen += len(node.key)
        node = node.parent
    return chain


def end_of_match(core: Any, node: Any, on_device: bool = False) -> Any:
    """The last node down to `node` where SGLang's own rules let a prefix end: for all levels, or on the device."""
    end = core.root_node
    validators = [component.create_match_validator(match_device_only=on_device) for component in core.components]
    for one in reversed(path_of(node)):
        if one.evicted and not one.backuped:
            break
        valid = [validator(one) for validator in validators]  # all are asked: they count as they go
        if all(valid):
            end = one
    return end


def depth(node: Any) -> int:
    """Tokens from the root to a node's end."""
    return sum(len(one.key) for one in path_of(node))


def copies(nodes: list[Any], component: Any) -> torch.Tensor:
    """Second-level indices of a component of nodes that all have them."""
    held = [node.component_data[component].host_value for node in nodes]
    return torch.cat([*held, torch.empty(0, dtype=torch.int64)])


def is_busy(node: Any) -> bool:
    """Whether its second-level pages are being written or read."""
    return node.write_through_pending_id is not None or any(data.host_lock_ref > 0 for data in node.component_data)


def cut(cache: Any, tokens: list[Any], window: list[Any], readable: Readable) -> bool:
    """Drop what lies beyond the readable part of a restore's chains; False when it is in use and stays."""
    core, size = cache.tree_core, cache.page_size
    result = DriveHostEvictionResult()
    left, done = readable.tokens * size, False
    for node in tokens:
        if left < len(node.key):
            done = _drop_evicted(cache, node, left, result) > 0
            break
        left -= len(node.key)
    left = readable.window * size
    for node in window:
        if node.id not in core._node_arena:  # gone with its tokens
            break
        if left < len(node.component_data[WINDOW].host_value):
            done |= _drop_window(cache, node, left, result) > 0
            break
        left -= len(node.component_data[WINDOW].host_value)
    cache._free_values(result.device_frees, result.host_frees)
    return done


def drop(cache: Any, lost: dict[Any, NDArray[np.bool_]]) -> int:
    """Forget the copies of lost logical pages, by component; returns how many pages were freed.

    Of tokens that only the second level has, those before the first lost page stay, without what lies below. A node
    that the device holds loses its copy with those below it, and is then written again. Of a window, what lies behind
    the last lost page stays; where the device has it, it is written again. Nothing is written before all is dropped.
    """
    result = DriveHostEvictionResult()
    freed, again, windows = 0, [], []
    arriving = {
        one.id for load in cache.ongoing_load_back.values() for one in path_of(cache.tree_core.node_by_id(load.node_id))
    }
    waiting = list(cache.tree_core.root_node.children.values())
    while waiting:
        node = waiting.pop()
        at = _lost_of(cache, node, FULL, lost[FULL])
        if len(at) and node.evicted:
            freed += _drop_evicted(cache, node, int(at[0]) * cache.page_size, result)
        elif len(at):
            pages, nodes = _drop_resident(cache, node, arriving, result)
            freed += pages
            again.extend(nodes)
        else:
            waiting.extend(node.children.values())
            at = _lost_of(cache, node, WINDOW, lost[WINDOW])
            if len(at) and node.id not in arriving:
                freed += _drop_window(cache, node, int(at[-1]) * cache.page_size, result)
                windows.append(node)
    cache._free_values(result.device_frees, result.host_frees)
    for node in again:
        cache._execute_and_commit_kv_backup(cache.tree_core._build_backup_kv_action(node))
    for node in windows:
        _write_window(cache, node)
    return freed


def _lost_of(cache: Any, node: Any, component: Any, lost: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Which pages of a node's copy are lost, counted from its first."""
    copy = node.component_data[component].host_value
    if copy is None:
        return np.empty(0, np.int64)
    return np.flatnonzero(lost[copy[:: cache.page_size].numpy() // cache.page_size])


def _split(cache: Any, node: Any, at: int) -> Any:
    """Cut a node before its token `at`; returns the new first part."""
    first, action = cache.tree_core._split_node(node.key, node, at)
    cache._apply_cache_actions([action] if action is not None else [])
    return first


def _drop_evicted(cache: Any, node: Any, at: int, result: Any) -> int:
    """Take a node from its token `at` on, and all below it, out of the tree, leaf by leaf as SGLang evicts them."""
    nodes = subtree(node)
    if any(is_busy(one) or not one.evicted for one in nodes):
        return 0
    if at:
        _split(cache, node, at)  # the first part is a new node, `node` keeps the rest
    before = _freed(result)
    for one in reversed(nodes):
        cache.tree_core._evict_host_leaf(one, result.tracker, result.device_frees, result.host_frees)
    return (_freed(result) - before) // cache.page_size


def _drop_resident(cache: Any, node: Any, arriving: set[int], result: Any) -> tuple[int, list[Any]]:
    """(pages freed, the nodes that lost their copies, parents first)."""
    nodes = subtree(node)
    if any(one.id in arriving or (one.backuped and is_busy(one)) for one in nodes):
        return 0, []
    freed = sum(
        _drop_evicted(cache, one, 0, result) for one in nodes if one.evicted and not one.parent.evicted
    )  # fmt: skip
    resident = [one for one in nodes if not one.evicted and one.backuped]
    before = _freed(result)
    for one in resident:
        for component in cache.tree_core.components:
            _evict_copy(cache, one, component, result)
        cache.tree_core._update_evictable_leaf_sets(one)
    cache.tree_core._update_evictable_leaf_sets(node.parent)
    return freed + (_freed(result) - before) // cache.page_size, resident


def _drop_window(cache: Any, node: Any, last: int, result: Any) -> int:
    """Forget a node's window up to the page that starts at its token `last`, or all where the device has it too."""
    core, behind = cache.tree_core, last + cache.page_size
    if is_busy(node):
        return 0
    before = _freed(result)
    on_device = node.component_data[WINDOW].value is not None
    if behind < len(node.key) and not on_device:
        node = _split(cache, node, behind)
    if node in core.evictable_host_leaves:  # nothing ends or continues there without it
        core._evict_host_leaf(node, result.tracker, result.device_frees, result.host_frees)
    else:
        _evict_copy(cache, node, core.components_by_type[WINDOW], result)
        core._update_evictable_leaf_sets(node)
    return (_freed(result) - before) // cache.page_size


def _evict_copy(cache: Any, node: Any, component: Any, result: Any) -> None:
    cache.tree_core._evict_component_and_detach_lru(
        node,
        component,
        device_frees=result.device_frees,
        host_frees=result.host_frees,
        target=EvictLayer.HOST,
        tracker=result.tracker,
    )


def _freed(result: Any) -> int:
    return sum(int(sum(len(value) for value in values)) for values in result.host_frees.values())


def _write_window(cache: Any, node: Any) -> None:
    """Write a node's window again, without its tokens, whose copy is whole."""
    core, part = cache.tree_core, node.component_data[WINDOW]
    there = core._node_arena.get(node.id) is node and node.backuped and not is_busy(node)
    if not there or part.value is None or part.host_value is not None:
        return
    component = core.components_by_type[WINDOW]
    transfers = component.build_hicache_transfers(node, CacheTransferPhase.BACKUP_HOST)
    nothing = torch.empty(0, dtype=torch.int64, device=cache.device)
    if cache.cache_controller.write(nothing, node_id=node.id, extra_pools=transfers) is None:
        return
    component.commit_hicache_transfer(node, CacheTransferPhase.BACKUP_HOST, transfers, cache_actions=[])
    cache._track_write_through_node(node.id, cache.inc_lock_ref(node.id).to_dec_params())

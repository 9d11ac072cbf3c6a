"""DeepSeek-V4's tier on a CPU: SGLang's own pool and UnifiedRadixCache, two arenas, every byte compared."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import dsv4_support as v4
from tests.models.dsv4_storm import Storm
from tests.models.dsv4_support import PAGE, Setting, setting

LENGTH = 3 * PAGE


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu(count=2))])
def one(request: pytest.FixtureRequest, tmp_path: Path, group: Any) -> Iterator[Setting]:
    with setting(tmp_path, group, device=request.param) as made:
        yield made


def ids_of(prefix: int, length: int = LENGTH) -> list[int]:
    return [100_000 * (prefix + 1) + at for at in range(length)]


def value_of(prefix: int, page: int) -> int:
    return prefix * 100 + page


def publish(one: Setting, prefix: int, length: int = LENGTH, released: int = 0) -> torch.Tensor:
    """Compute a prefix and put it into the tree; `released` tokens at its front have left the window before."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    indices = one.take(length)
    assert indices is not None
    stamp(one, prefix, indices)
    if released:
        one.allocator.free_swa(indices[:released])
    params = InsertParams(key=RadixKey(ids_of(prefix, length), None), value=indices, swa_evicted_seqlen=released)
    one.cache.insert(params)
    settle(one)
    return indices


def stamp(one: Setting, prefix: int, indices: torch.Tensor) -> None:
    pages = (indices[::PAGE] // PAGE).tolist(), (one.window_of(indices)[::PAGE] // PAGE).tolist()
    for space, own in zip(one.spaces, pages, strict=True):
        for at, page in enumerate(own):
            v4.stamp(space, page, value_of(prefix, at))


def settle(one: Setting) -> None:
    """A scheduler's step, after what is under way has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    one.cache.check_hicache_events()


def match(one: Setting, prefix: int, length: int = LENGTH) -> Any:
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    return one.cache.match_prefix(MatchPrefixParams(key=RadixKey(ids_of(prefix, length), None)))


def restore(one: Setting, prefix: int, length: int = LENGTH) -> int:
    """As a request is admitted: matched, locked, loaded back. Every byte of what it gets is compared."""
    from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams

    found = match(one, prefix, length)
    req = v4.request(found)
    indices = found.device_indices
    lock = one.cache.inc_lock_ref(req.last_node)
    if found.host_hit_length or found.swa_host_hit_length:
        params = InitLoadBackParams(found.best_match_node, found.host_hit_length, req=req)
        loaded, _ = one.cache.init_load_back(params)
        indices = torch.cat([indices, loaded])
        one.cache.ready_to_load_host_cache()
    one.cache.dec_lock_ref(req.last_node, lock.to_dec_params())
    settle(one)
    compare(one, prefix, indices)
    return len(indices)


def compare(one: Setting, prefix: int, indices: torch.Tensor) -> None:
    tokens, window = one.spaces
    for at, page in enumerate((indices[::PAGE] // PAGE).tolist()):
        assert v4.holds(tokens, page, value_of(prefix, at)), f"page {at} of prefix {prefix} has other blocks"
    if len(indices):  # one page is more than the window
        last = int(one.window_of(indices[-PAGE:])[0]) // PAGE
        assert last > 0
        assert v4.holds(window, last, value_of(prefix, len(indices) // PAGE - 1)), "the window is another's"


def evict(one: Setting) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    one.cache.evict(EvictParams(num_tokens=10**6, swa_num_tokens=10**6))


def wipe(one: Setting) -> None:
    for space in one.spaces:
        for buffer in space.tier_buffers:
            buffer.view(torch.uint8).zero_()


def test_a_page_of_each_index_space_has_all_buffers_of_sglangs_host_pools() -> None:
    from specgen_engine.tier.dsv4 import spaces_of

    tokens, window = spaces_of(v4.device_pool(8, 6), PAGE, 8 * PAGE)
    block_4, block_128 = 64 * 584 + 64, 2 * 584 + 560  # padded to multiples of 576
    assert (tokens.layers, tokens.shape.widths) == ((1, 2), (2, 1))
    assert tokens.shape.page_bytes == block_4 + 64 * 132 + block_128
    assert (window.layers, window.shape.widths) == ((0, 1, 2), (1, 3, 1))
    keys = 256 * 584 + 256
    assert window.shape.page_bytes == 3 * keys + 8 * (2048 + 512) * 4
    assert [tokens.shape.span(range(1, 2)), window.shape.span(range(1, 3))] == [(2, 1), (1, 4)]


def test_every_buffer_comes_back_byte_for_byte(one: Setting) -> None:
    publish(one, 0)
    publish(one, 1)
    evict(one)
    assert one.allocator.full_available_size() == one.allocator.size_full
    assert one.allocator.swa_available_size() == one.allocator.size_swa
    wipe(one)
    found = match(one, 1)
    assert (len(found.device_indices), found.host_hit_length, found.swa_host_hit_length) == (0, LENGTH, PAGE)
    assert restore(one, 1) == LENGTH
    assert restore(one, 0) == LENGTH
    one.books()
    counts = one.cache.stats.counts
    assert (counts["restores"], counts["restored_tokens"]) == (2, 2 * LENGTH)
    tokens, window = one.spaces
    assert counts["restored_bytes"] == 2 * (3 * tokens.shape.page_bytes + window.shape.page_bytes)
    assert restore(one, 1) == LENGTH
    assert one.cache.stats.counts["restores"] == 2, "what the device has is not loaded again"


def test_a_flush_gives_all_pages_back(one: Setting) -> None:
    publish(one, 0)
    one.cache.reset()
    one.allocator.clear()
    one.books()
    assert [pool.check_integrity()["used"] for pool in one.pools] == [0, 0]


def test_a_prefix_whose_window_is_gone_is_computed_again_from_where_one_is_left(one: Setting) -> None:
    """As SGLang treats it: the tokens' copy is whole, and found only up to the last end that has its window."""
    publish(one, 0, PAGE)
    publish(one, 0, 2 * PAGE)
    publish(one, 0, 3 * PAGE)
    evict(one)
    wipe(one)
    (_, middle, last) = v4.path(one, match(one, 0).best_match_node)
    lose(one, 1, last)
    assert match(one, 0).host_hit_length == 2 * PAGE
    assert last.id not in one.cache.tree_core._node_arena, "as where SGLang evicts a leaf's window"
    lose(one, 1, middle)
    assert match(one, 0).host_hit_length == PAGE
    one.books()
    assert restore(one, 0) == PAGE


def test_an_inner_window_that_is_lost_hides_no_longer_prefix(one: Setting) -> None:
    publish(one, 0, PAGE)
    publish(one, 0, 2 * PAGE)
    publish(one, 0, 3 * PAGE)
    evict(one)
    wipe(one)
    (_, middle, _) = v4.path(one, match(one, 0).best_match_node)
    lose(one, 1, middle)
    assert match(one, 0, 2 * PAGE).host_hit_length == PAGE
    assert match(one, 0).host_hit_length == 3 * PAGE
    assert restore(one, 0) == 3 * PAGE
    one.books()


def test_of_a_long_nodes_window_what_lies_behind_the_lost_page_stays(one: Setting) -> None:
    publish(one, 0)
    evict(one)
    wipe(one)
    first, last = v4.path(one, match(one, 0).best_match_node)
    assert (len(first.key), len(last.key)) == (2 * PAGE, PAGE), "SGLang cuts a leaf at its window"
    lose(one, 1, first, page=0)
    assert [match(one, 0, pages * PAGE).host_hit_length for pages in (1, 2, 3)] == [0, 2 * PAGE, 3 * PAGE]
    one.books()
    assert restore(one, 0, 2 * PAGE) == 2 * PAGE


def test_tokens_that_are_lost_take_what_lies_behind_them(one: Setting) -> None:
    publish(one, 0, PAGE)
    publish(one, 0, 3 * PAGE)
    evict(one)
    wipe(one)
    last = v4.path(one, match(one, 0).best_match_node)[-1]
    lose(one, 0, last)
    assert match(one, 0).host_hit_length <= 2 * PAGE
    one.books()
    assert restore(one, 0) > 0


def lose(one: Setting, part: int, node: Any, page: int = -1) -> None:
    """A rank says at the next step that a page of a node is lost."""
    from specgen_engine.tier.unified_losses import FULL, WINDOW

    copy = node.component_data[(FULL, WINDOW)[part]].host_value
    one.pools[part]._lose((copy[::PAGE].numpy() // PAGE)[[page]])
    settle(one)


@pytest.mark.parametrize("part", [0, 1], ids=["tokens", "window"])
def test_what_the_device_has_is_written_again(one: Setting, part: int) -> None:
    publish(one, 0)
    (*_, last) = v4.path(one, match(one, 0).best_match_node)
    written = one.cache.stats.counts["written_bytes"]
    lose(one, part, last)
    settle(one)
    again = one.cache.stats.counts["written_bytes"] - written
    sizes = [space.shape.page_bytes for space in one.spaces]
    assert again == (sizes[1] if part else sizes[0] + sizes[1])
    one.books()
    evict(one)
    wipe(one)
    assert restore(one, 0) == LENGTH


@pytest.mark.parametrize("part", [0, 1], ids=["tokens", "window"])
def test_a_page_with_another_tag_is_a_miss(tmp_path: Path, group: Any, part: int) -> None:
    from specgen_engine.tier.movers import _tag_address
    from specgen_engine.tier.unified_losses import FULL, WINDOW

    with setting(tmp_path, group) as one:
        publish(one, 0, PAGE)
        publish(one, 0, 2 * PAGE)
        evict(one)
        wipe(one)
        last = v4.path(one, match(one, 0, 2 * PAGE).best_match_node)[-1]
        pool = one.pools[part]
        copy = last.component_data[(FULL, WINDOW)[part]].host_value
        address = _tag_address(pool.arena, pool._refs(copy[:1].numpy() // PAGE))
        ctypes.memset(address, 0xEE, 8)
        assert restore(one, 0, 2 * PAGE) == PAGE
        assert one.cache.stats.counts["mismatched_pages"] == 1
        assert one.cache.stats.counts["missed_tokens"] == PAGE
        settle(one)
        one.books()


def test_an_end_whose_window_is_lost_meanwhile_is_no_end(one: Setting) -> None:
    """Found by a request, lost before its restore: the prefix ends a page earlier, where SGLang's rules let it."""
    from specgen_engine.tier.unified_losses import WINDOW

    for pages in (1, 2, 3):
        publish(one, 0, pages * PAGE)
    evict(one)
    wipe(one)
    middle = v4.path(one, match(one, 0, 2 * PAGE).best_match_node)[-1]
    assert middle.children, "it has a node below it, so that its tokens stay"
    one.pools[1]._lose(middle.component_data[WINDOW].host_value[:1].numpy() // PAGE)
    assert restore(one, 0, 2 * PAGE) == PAGE
    assert middle.component_data[WINDOW].host_value is None
    assert restore(one, 0) == 3 * PAGE
    one.books()


def test_pages_are_let_go_where_the_device_has_no_room_for_them(one: Setting) -> None:
    publish(one, 0)
    evict(one)
    taken = one.allocator.full_attn_allocator.alloc(one.allocator.full_available_size())
    assert restore(one, 0) == 0
    assert [pool.check_integrity()["in_flight"] for pool in one.pools] == [0, 0]
    one.allocator.full_attn_allocator.free(taken)
    wipe(one)
    assert restore(one, 0) == LENGTH


def test_each_layer_waits_for_its_own_planes(one: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's layer 0 has a window only; its events must not stand for another layer's blocks."""
    publish(one, 0)
    evict(one)
    asked: list[tuple[int, str, int]] = []
    layer = [0]
    done = type(one.cache.cache_controller.layer_done_counter.events[0])
    complete = done.complete
    monkeypatch.setattr(done, "complete", lambda self, at: (complete(self, at), layer.__setitem__(0, at + 1)))
    for name, pool in zip(("tokens", "window"), one.pools, strict=True):
        load = pool.load_to_device_per_layer

        def seen(*given: Any, name: str = name, load: Any = load) -> None:
            asked.append((layer[0], name, given[3]))
            load(*given)

        monkeypatch.setattr(pool, "load_to_device_per_layer", seen)
    assert restore(one, 0) == LENGTH
    assert asked == [(0, "window", 0), (1, "tokens", 0), (1, "window", 1), (2, "tokens", 1), (2, "window", 2)]


def test_a_forks_answer_is_not_written(one: Setting) -> None:
    from specgen_engine.tier.common import NOBODY, Writer
    from specgen_engine.tier.policy import Source

    publish(one, 0, PAGE)
    one.cache._writer = Writer(Source.FORK, "s", True)
    publish(one, 0)
    one.cache._writer = NOBODY
    written = [node.backuped for node in v4.path(one, match(one, 0).best_match_node)]
    assert (written[0], written[-1]) == (True, False)
    nodes = v4.path(one, match(one, 0).best_match_node)
    assert [one.cache.segment_of(node).source for node in nodes] == [Source.PLAIN, Source.FORK, Source.FORK]
    assert one.cache.unread_tokens() == PAGE, "of leaves"
    publish(one, 0)
    assert all(node.backuped for node in v4.path(one, match(one, 0).best_match_node)), "now another request has it too"


def test_a_fork_point_of_a_running_base_is_written_and_restored(one: Setting) -> None:
    """Mid-decode, at a token inside a page: what lies before its page is in the tier, and the base goes on."""
    from specgen_engine.scheduler.fork_point import insert_fork_point

    indices = one.take(LENGTH)
    assert indices is not None
    stamp(one, 0, indices)
    base = v4.running(one, ids_of(0), indices)
    assert insert_fork_point(base, 2 * PAGE + 17, one.cache) == 2 * PAGE
    settle(one)
    assert one.cache.stats.counts["written_bytes"] > 0
    one.cache.cache_finished_req(base, is_insert=False, kv_len_to_handle=LENGTH)
    evict(one)
    one.books()
    wipe(one)
    assert restore(one, 0) == 2 * PAGE


def test_the_servers_state_has_the_books_of_both_index_spaces(one: Setting) -> None:
    from types import SimpleNamespace

    from specgen_engine.tier.build import describe

    publish(one, 0)
    total = one.allocator.size_full
    state = describe(SimpleNamespace(tree_cache=one.cache, max_total_num_tokens=total))
    assert state is not None
    assert (state["integrity"], state["lenders"]) == ("ok", ["lender-0"])
    assert (state["pages"]["logical"], state["window_pages"]["logical"]) == (3, 3)
    for name in ("device", "window_device"):
        books = state[name]
        assert books["free"] + books["evictable"] + books["protected"] == books["total"]


def test_nothing_is_fetched_into_a_window_that_running_requests_may_ask_for(one: Setting) -> None:
    from types import SimpleNamespace

    publish(one, 0)
    evict(one)
    wipe(one)
    queue = [SimpleNamespace(rid="r", origin_input_ids=[*ids_of(0), 5], output_ids=[], extra_key=None)]
    windows = one.allocator.size_swa // (v4.WINDOW + 2 * PAGE)
    assert one.cache.prefetcher.step(queue, 0, windows + 1) == 0
    queue[0].rid = "r2"
    assert one.cache.prefetcher.step(queue, 0, 1) == LENGTH
    settle(one)
    assert one.cache.stats.counts["prefetched_tokens"] == LENGTH
    compare(one, 0, match(one, 0).device_indices)
    one.books()


def test_the_newest_prefix_finds_room_in_an_arena_that_is_full(tmp_path: Path, group: Any) -> None:
    """Of tokens, while there is room for windows; SGLang evicts the oldest where it is told that too little is free."""
    length = 6 * PAGE
    with setting(tmp_path, group, chunks=(8,)) as one:
        tokens, window = one.pools
        assert tokens.limit < tokens.page_num
        prefixes = tokens.limit // 6 + 2
        assert prefixes < window.limit
        for prefix in range(prefixes):
            publish(one, prefix, length, released=5 * PAGE)
            evict(one)
        wipe(one)
        assert restore(one, prefixes - 1, length) == length
        assert restore(one, 0, length) == 0
        one.books()


def test_pages_move_to_another_lender_when_theirs_takes_its_memory_back(tmp_path: Path, group: Any) -> None:
    with setting(tmp_path, group, chunks=(8, 8)) as one:
        publish(one, 0)
        evict(one)
        wipe(one)
        for epoch in one.own[0].epochs().values():
            one.own[0].revoke(epoch, 8, bound_s=2.0)
        one.cache.check_hicache_events()
        assert one.cache.stats.counts["moved_pages"] > 0
        one.books()
        assert restore(one, 0) == LENGTH


def test_when_all_lenders_have_gone_everything_is_computed_again_and_the_books_are_right(one: Setting) -> None:
    publish(one, 0)
    publish(one, 1)
    evict(one)
    wipe(one)
    for lender in one.own:
        for epoch in lender.epochs().values():
            lender.revoke(epoch, 16, bound_s=2.0)
    assert restore(one, 0) == 0
    one.cache.check_hicache_events()
    one.books()
    assert [pool.check_integrity()["used"] for pool in one.pools] == [0, 0]
    publish(one, 2)
    one.books()


def test_books_and_bytes_are_right_in_storms_of_losses_deaths_and_prefetches(tmp_path: Path, group: Any) -> None:
    counts: Counter[str] = Counter()
    for seed in (*range(10), 137):  # in the last one, a write's end once gave up the lock of a load under way
        folder = tmp_path / str(seed)
        folder.mkdir()
        with setting(folder, group, chunks=(6, 6)) as one:
            storm = Storm(one, seed, folder=folder)
            storm.play(250)
            counts += Counter({"deaths": storm.deaths, **one.cache.stats.counts})
    for name in ("restored_tokens", "prefetched_tokens", "missed_tokens", "lost_pages", "moved_pages", "deaths"):
        assert counts[name] > 0, name
    assert counts["late_mismatched_pages"] == counts["mismatched_pages"] == 0


CONTEXT: dict[str, Any] = {"pages": 8, "window_pages": 6}


def refusal(group: Any, **given: Any) -> str:
    from specgen_engine.config import KvConfig
    from specgen_engine.tier.base import TierError
    from specgen_engine.tier.build import build_cache

    with pytest.raises(TierError) as refused:
        build_cache(v4.context(group, **CONTEXT, **given), KvConfig(tier="loopback", chunk_mib=2), pytest.fail)
    return str(refused.value)


def test_storage_below_it_is_refused(group: Any) -> None:
    message = refusal(group, hicache_storage_backend="file")
    assert "--hicache-storage-backend file with DeepSeekV4TokenToKVPool" in message
    assert message.endswith("leave it out")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda pool: setattr(pool, "_unified_kv", True), "in one buffer is not supported"),
        (lambda pool: setattr(pool, "c4_kv_pool", object()), "blocks of 4 in a object are not supported"),
        (lambda pool: setattr(pool, "swa_page_size", 128), "--page-size 256: .*the window's 128: use 256"),
        (lambda pool: setattr(pool, "swa_size", 8 * PAGE), "a window buffer of .* has 7 pages for 2048 tokens"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(spoil: Callable[[Any], None], says: str) -> None:
    from specgen_engine.tier.base import TierError
    from specgen_engine.tier.dsv4 import spaces_of

    pool = v4.device_pool(8, 6)
    spoil(pool)
    with pytest.raises(TierError, match=says):
        spaces_of(pool, PAGE, 8 * PAGE)

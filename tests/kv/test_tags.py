"""Tags read a chunk at a time: what is read again, what is not, and that nothing old is called wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import PageRefs
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv
from specgen_engine.kv.tags import places

CHUNK, SLOTS, MAPPED = 1 << 14, 24, 20


@pytest.fixture
def arena() -> Iterator[PageArena]:
    backend = LoopbackBackend()
    buffer = np.zeros((64, 512), np.uint8)
    one = PageArena(backend, [_kv.Plane(buffer.ctypes.data, 512, 512)], _kv.ArenaLayout.PAGE_FIRST, SLOTS, CHUNK)
    chunks = [backend.chunk(CHUNK) for _ in range(MAPPED)]
    for chunk in chunks:
        one.add_chunk(chunk.export_fd())
    yield one
    del buffer


def write(arena: PageArena, refs: PageRefs, tags: np.ndarray) -> None:
    for page, tag in zip(refs.pages.tolist(), tags.tolist(), strict=True):
        slot, within = divmod(page, arena.layout.pages_per_chunk)
        address = arena.space.base + slot * arena.chunk_bytes + arena.layout.tag_offset + within * 8
        ctypes.memmove(address, np.array([tag], np.uint64).ctypes.data, 8)


def filled(arena: PageArena, chunks: int) -> list[PageRefs]:
    """Pages of so many chunks, written, one list a chunk."""
    all_of = [arena.allocate(arena.layout.pages_per_chunk) for _ in range(chunks)]
    for refs in all_of:
        write(arena, refs, refs.generations)
    return all_of


def wrong(arena: PageArena, refs: PageRefs) -> list[int]:
    return arena.tags.wrong(refs, places(arena, refs)).tolist()


def test_wrong_tags_are_found_in_any_order_of_pages(arena: PageArena) -> None:
    refs = PageRefs(*(np.concatenate(parts) for parts in zip(*filled(arena, 5), strict=True)))
    order = np.random.default_rng(3).permutation(len(refs))
    refs = refs.take(order)
    assert wrong(arena, refs) == []
    arena.tags.forget()
    bad = refs.take(np.array([2, 70, 100]))
    write(arena, bad, bad.generations + np.uint64(1))
    assert wrong(arena, refs) == [2, 70, 100]


def test_many_restores_of_a_step_take_few_reads_and_the_next_step_reads_anew(arena: PageArena) -> None:
    chunks = filled(arena, 16)
    for refs in chunks:
        assert wrong(arena, refs) == []
    assert arena.tags.reads == 5  # of 1, 2, 4, 8 and 5 chunks
    assert wrong(arena, chunks[3]) == []
    assert arena.tags.reads == 5
    arena.tags.forget()
    write(arena, chunks[3], chunks[3].generations + np.uint64(1))
    assert len(wrong(arena, chunks[3])) == len(chunks[3])


def test_pages_that_were_written_after_their_chunk_was_read_are_not_wrong(arena: PageArena) -> None:
    first, second = (arena.allocate(arena.layout.pages_per_chunk // 2) for _ in range(2))
    write(arena, first, first.generations)
    assert wrong(arena, first) == []
    write(arena, second, second.generations)  # in the same chunk
    assert wrong(arena, second) == []


def test_more_chunks_than_there_is_memory_for_are_read_all_the_same(
    arena: PageArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specgen_engine.kv.tags.FIRST_BYTES", 0)
    chunks = filled(arena, 12)
    all_refs = PageRefs(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
    assert wrong(arena, chunks[1]) == []
    three = PageRefs(*(np.concatenate(parts) for parts in zip(*chunks[:3], strict=True)))
    assert arena.tags.tags(three, places(arena, three)).tolist() == three.generations.tolist()  # one is known already
    for refs in (chunks[0], chunks[5], all_refs, chunks[1], all_refs):
        assert wrong(arena, refs) == []
        write(arena, refs.take(np.array([1])), np.array([5], np.uint64))
        arena.tags.forget()
        assert wrong(arena, refs) == [1]
        write(arena, refs.take(np.array([1])), refs.generations[1:2])
        arena.tags.forget()


def test_chunks_that_are_gone_are_not_read_ahead(arena: PageArena) -> None:
    chunks = filled(arena, 12)
    arena.revoke([2, 5], 1.0)
    for slot in (0, 1, 3, 4, 6, 7):
        assert wrong(arena, chunks[slot]) == []

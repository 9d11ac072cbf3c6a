"""Pages of SGLang's own pools on their way out and back, moved, lost, overwritten; CPU loopback, and two GPUs."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import pytest
import torch

from specgen_engine.kv.base import KvError, StalePages
from specgen_engine.kv.hold import page_address
from specgen_engine.tier.probe import probe
from tests.tier.support import FP8, Tier, buffers, fill, tier

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda:0", id="cuda", marks=pytest.mark.gpu(count=2))]
PAGES = [5, 1, 6, 3, 2]


def page_bytes(tier: Tier, page: int) -> list[torch.Tensor]:
    size = tier.pool.page_size
    return [buffer[page * size : (page + 1) * size].clone().cpu() for buffer in buffers(tier.device)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("mha", torch.bfloat16), ("mha", FP8), ("mha", torch.float32), ("mla", torch.bfloat16), ("mla", FP8)],
)
def test_a_round_trip_keeps_every_byte(
    tmp_path: Path, kind: str, dtype: torch.dtype, page_size: int, device: str
) -> None:
    with tier(tmp_path, kind, page_size, dtype, device) as one:
        report = probe(one.device, one.pool.shape, one.arena)
        assert report.pages >= 1
        before = fill(one.device, 3)
        wanted = [page_bytes(one, page) for page in PAGES]
        indices = one.write(PAGES)
        for buffer in buffers(one.device):
            buffer.zero_()
        assert one.read(indices, PAGES[::-1]) == len(PAGES)
        for page, expected in zip(PAGES[::-1], wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(page_bytes(one, page), expected, strict=True))
        untouched = [buffer[7 * page_size :] for buffer in buffers(one.device)]
        assert all(int(rest.sum()) == 0 for rest in untouched)
        assert len(before) == len(wanted[0])
        one.pool.free(indices)
        assert one.pool.check_integrity()["used"] == 0
        assert one.pool.stats.counts["late_mismatched_pages"] == 0


def test_pages_move_to_another_lender_when_theirs_is_called_back(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 16, torch.float32) as one:
        fill(one.device, 4)
        wanted = [page_bytes(one, page) for page in PAGES]
        indices = one.write(PAGES)
        (epoch,) = one.own[0].epochs().values()
        assert one.own[0].revoke(epoch, bound_s=2.0).outstanding == 0
        assert one.pool.stats.counts["moved_pages"] == len(PAGES)
        assert one.pool.stats.counts["revoked_chunks"] == 4
        assert len(one.pool.lost_pages()) == 0
        assert one.pool.capacity() == 4 * one.arena.layout.pages_per_chunk
        assert one.read(indices, [10, 11, 12, 13, 14]) == len(PAGES)
        for page, expected in zip([10, 11, 12, 13, 14], wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(page_bytes(one, page), expected, strict=True))
        one.pool.check_integrity()


def test_without_room_elsewhere_pages_are_lost_and_said_to_be(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 1, torch.float32, chunks=(1, 1)) as one:
        fill(one.device, 4)
        per_chunk = one.arena.layout.pages_per_chunk
        indices = [one.write(list(range(1, 301))) for _ in range(2)]
        before = one.pool.capacity()
        (epoch,) = one.own[1].epochs().values()
        one.own[1].revoke(epoch, bound_s=2.0)
        lost = len(one.pool.lost_pages())
        assert before == 2 * per_chunk
        assert one.pool.capacity() == per_chunk
        assert lost == 600 - per_chunk > 0
        kept = sum(one.pool.begin_restore(part).pages for part in indices)
        assert kept <= per_chunk


def test_a_lenders_death_loses_no_page_and_gives_no_new_ones(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 16, torch.float32, chunks=(4,)) as one:
        fill(one.device, 4)
        wanted = page_bytes(one, 5)
        indices = one.write([5])
        one.own[0].crash()
        link = next(iter(one.lenders._links.values()))
        link._thread.join(timeout=5)
        assert link.lost is not None
        assert one.pool.capacity() == 1
        assert one.read(indices, [9]) == 1
        assert all(torch.equal(a, b) for a, b in zip(page_bytes(one, 9), wanted, strict=True))
        late = one.write([6])
        assert one.read(late, [10]) == 0
        assert len(one.pool.lost_pages()) == 1


def test_a_tag_that_is_not_the_pages_is_a_miss_and_counted(tmp_path: Path) -> None:
    with tier(tmp_path, "mla", 16, torch.bfloat16) as one:
        fill(one.device, 4)
        indices = one.write(PAGES)
        refs = one.pool._refs(one.pool._pages_of(indices))
        page = int(refs.pages[3])
        slot, within = divmod(page, one.arena.layout.pages_per_chunk)
        tag = one.arena.space.base + slot * one.arena.chunk_bytes + one.arena.layout.tag_offset + within * 8
        ctypes.memset(tag, 0xEE, 8)
        assert one.read(indices, [10, 11, 12, 13, 14]) == 3
        assert one.pool.stats.counts["mismatched_pages"] == 1
        assert one.pool.lost_pages().tolist() == [int(indices[3 * 16]) // 16]


def test_a_quiet_lender_is_a_miss_and_loses_nothing_that_was_written(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 16, torch.float32, chunks=(4,)) as one:
        fill(one.device, 4)
        indices = one.write([5])
        with one.own[0].quiet(3.0) as reached:
            assert reached
            restore = one.pool.begin_restore(indices)
            assert (restore.pages, restore.quiet) == (0, True)
            later = one.pool.alloc(16)
            one.pool.backup_from_device_all_layer(one.device, later, torch.arange(96, 112), "kernel")
        assert one.pool.lost_pages().tolist() == [int(later[0]) // 16]
        for _ in range(100):
            restore = one.pool.begin_restore(indices)
            if restore.held is not None:
                break
            time.sleep(0.05)  # the lender's word that it is over is on its way
        assert restore.pages == 1
        restore.held.release()


def test_storage_pages_travel_through_host_tensors(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 16, torch.bfloat16) as one:
        fill(one.device, 4)
        wanted = page_bytes(one, 5)
        source, target = one.write([5]), one.pool.alloc(16)
        data = one.pool.get_data_page(source[0])
        assert data.nbytes == one.pool.get_dummy_flat_data_page().nbytes == one.pool.shape.page_bytes
        one.pool.set_from_flat_data_page(target[0], data)
        assert one.read(target, [9]) == 1
        assert all(torch.equal(a, b) for a, b in zip(page_bytes(one, 9), wanted, strict=True))
        one.pool._lose(one.pool._pages_of(source))
        with pytest.raises(StalePages):
            one.pool.get_data_page(source[0])


def test_integrity_says_which_books_differ(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 16, torch.float32) as one:
        fill(one.device, 4)
        one.write([5])
        assert page_address(one.arena, 0) == one.arena.space.base
        one.pool._arena_pages[:] = -1
        with pytest.raises(KvError, match="0 logical pages are backed, 1 were counted"):
            one.pool.check_integrity()
        one.pool._backed = 0
        with pytest.raises(KvError, match="0 pages backed and 0 waiting to be freed, the arena holds 1"):
            one.pool.check_integrity()


def test_beyond_the_agreed_limit_nothing_is_given_out(tmp_path: Path) -> None:
    with tier(tmp_path, "mha", 16, torch.float32) as one:
        one.pool.limit = 2
        first = one.pool.alloc(32)
        assert first is not None
        assert one.pool.alloc(16) is None
        one.pool.free(first)
        assert one.pool.alloc(16) is not None

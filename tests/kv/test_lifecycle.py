"""Copies, revocation, quiet spells, expiry, and deaths of real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from specgen_engine.kv.base import ArenaFull, CopyTimeout, KvError, QuietLease, StalePages
from specgen_engine.kv.hold import hold
from specgen_engine.kv.lender import MAX_QUIET_S
from specgen_engine.kv.native import _kv
from tests.kv.support import Side, make_lender, open_fds, settles

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("layout", [_kv.ArenaLayout.PAGE_FIRST, _kv.ArenaLayout.LAYER_FIRST])
@pytest.mark.parametrize("segment_bytes", [128, 8192])
def test_pages_come_back_and_untouched_ones_stay(tmp_path: Path, layout: _kv.ArenaLayout, segment_bytes: int) -> None:
    from specgen_engine.kv.arena import PageArena
    from specgen_engine.kv.loopback import LoopbackBackend

    random = np.random.default_rng(0)
    pool = [random.integers(0, 256, (40, size), np.uint8) for size in (528, 1152, 64)]
    planes = [_kv.Plane(p.ctypes.data, p.strides[0], p.shape[1]) for p in pool]
    arena = PageArena(LoopbackBackend(), planes, layout, 8, 1 << 14, segment_bytes)
    side = Side("tp0")
    side.arena = arena
    lender = make_lender(tmp_path)
    link = side.connect(lender)
    link.grow(4)
    refs = arena.allocate(30)
    out, back = random.permutation(40)[:30], random.permutation(40)[:30]
    before = [p.copy() for p in pool]
    arena.export(out, refs).result()
    assert all(np.array_equal(p, b) for p, b in zip(pool, before, strict=True))
    arena.import_(back, refs).result()
    for plane, old in zip(pool, before, strict=True):
        old[back] = old[out]
        assert np.array_equal(plane, old)
    link.close()
    lender.close()


def test_pages_given_out_again_are_stale_to_their_former_holder(tmp_path: Path) -> None:
    side, lender = Side("tp0"), make_lender(tmp_path)
    link = side.connect(lender)
    link.grow(1)
    first = side.arena.allocate(3)
    side.arena.export([0, 1, 2], first).result()
    side.arena.release(first)
    second = side.arena.allocate(3)
    with pytest.raises(StalePages):
        side.arena.import_([0, 1, 2], first)
    with pytest.raises(StalePages) as caught:
        side.arena.import_([0, 1, 2], second).result()
    assert caught.value.positions.tolist() == [0, 1, 2]
    side.arena.export([1], second.take(slice(1, 2))).result()
    with pytest.raises(StalePages) as caught:
        side.arena.import_([0, 1, 2], second).result()
    assert caught.value.positions.tolist() == [0, 2]
    link.close()
    lender.close()


def test_the_later_of_two_holds_may_end_first(tmp_path: Path) -> None:
    side, lender = Side("tp0"), make_lender(tmp_path)
    link = side.connect(lender)
    link.grow(1)
    earlier, later = (hold(side.arena, side.arena.allocate(2), _kv.Direction.EXPORT) for _ in range(2))
    later.release()
    assert later.done()
    assert not earlier.done()
    earlier.release()
    side.arena.check_integrity()
    link.close()
    lender.close()


def test_revocation_drains_copies_and_keeps_its_bound(tmp_path: Path) -> None:
    side, lender = Side("tp0", delay_us=2000), make_lender(tmp_path)
    link = side.connect(lender)
    link.grow(2)
    refs = side.arena.allocate(20)
    copy = side.arena.export(np.arange(20), refs)  # 40 ms
    with pytest.raises(CopyTimeout):
        copy.result(timeout_s=0.001)
    with pytest.raises(ValueError, match="copy in flight"):
        side.arena.release(refs)
    late = lender.revoke(link.epoch, bound_s=0.005)
    assert late.outstanding > 0
    assert 0.005 <= late.seconds < 0.03
    assert lender.check_integrity().revoking == late.outstanding
    with pytest.raises(StalePages):
        side.arena.import_(np.arange(20), refs)
    copy.result()
    assert settles(lambda: lender.counts().revoking == 0)
    assert lender.check_integrity().free == lender.total_chunks
    assert side.arena.check_integrity().total == 0
    link.close()
    lender.close()


def test_revoking_one_chunk_leaves_the_others_in_use(tmp_path: Path) -> None:
    side, lender = Side("tp0"), make_lender(tmp_path)
    link = side.connect(lender)
    link.grow(3)
    per_chunk = side.arena.layout.pages_per_chunk
    refs = side.arena.allocate(3 * per_chunk)
    side.fill(np.arange(3 * per_chunk), 9)
    side.arena.export(np.arange(3 * per_chunk), refs).result()
    assert lender.revoke(link.epoch, 1).chunks == 1
    kept = refs.take(slice(0, 2 * per_chunk))
    side.fill(np.arange(64), 1)
    side.arena.import_(np.arange(2 * per_chunk), kept).result()
    assert side.holds(np.arange(2 * per_chunk), 9)
    assert side.arena.release(refs) == 2 * per_chunk
    link.close()
    lender.close()


def test_quiet_is_a_miss_or_a_wait_and_ends_by_itself(tmp_path: Path) -> None:
    side, lender = Side("tp0"), make_lender(tmp_path)
    link = side.connect(lender)
    link.grow(1)
    refs = side.arena.allocate(1)
    with lender.quiet(0.15) as reached:
        assert reached
        with pytest.raises(QuietLease, match="quiet for another"):
            side.arena.export([0], refs)
        with pytest.raises(QuietLease):
            side.arena.export([0], refs, quiet="wait", wait_s=0.02)
        start = time.monotonic()
        side.arena.export([0], refs, quiet="wait", wait_s=2).result()
        assert 0.05 < time.monotonic() - start < 1
    with lender.quiet(5):
        pass
    side.arena.export([0], refs, quiet="wait", wait_s=2).result()
    with pytest.raises(KvError, match=f"at most {MAX_QUIET_S}"), lender.quiet(MAX_QUIET_S + 1):
        pass
    link.close()
    lender.close()


def test_a_silent_borrower_loses_its_lease(tmp_path: Path) -> None:
    side, lender = Side("tp0"), make_lender(tmp_path, lease_s=0.2)
    link = side.connect(lender)
    link._renew_s = 60  # no more signs of life
    time.sleep(0.1)  # the renewal that was due at first
    link.grow(1)
    assert settles(lambda: lender.counts().free == lender.total_chunks)
    assert lender.check_integrity().free == lender.total_chunks
    assert side.arena.check_integrity().total == 0
    link.close()
    lender.close()


def test_several_borrowers_and_lenders_share_nothing_but_the_sockets(tmp_path: Path) -> None:
    lenders = [make_lender(tmp_path, f"gpu{i}", chunks=4) for i in range(2)]
    sides = [Side(f"tp{i}") for i in range(2)]
    links = [[side.connect(lender) for lender in lenders] for side in sides]
    for row in links:
        for link in row:
            assert link.grow(2) == 2
    refs = [side.arena.allocate(side.arena.counts().free) for side in sides]
    for value, (side, ref) in enumerate(zip(sides, refs, strict=True)):
        pages = np.arange(len(ref)) % 64
        side.fill(np.arange(64), 50 * value)
        side.arena.export(pages, ref).result()
    for value, (side, ref) in enumerate(zip(sides, refs, strict=True)):
        side.fill(np.arange(64), 1)
        side.arena.import_(np.arange(len(ref)) % 64, ref).result()
        assert side.holds(np.arange(min(64, len(ref))), 50 * value)
    for row in links:
        for link in row:
            link.close()
    for lender in lenders:
        assert lender.check_integrity().free == 4
        lender.close()


LENDER = [
    sys.executable,
    "-m",
    "specgen_engine.kv",
    "--backend",
    "loopback",
    "--chunk-mib",
    "1",
    "--chunks",
    "4",
    "--directory",
]


def test_a_killed_lender_loses_no_page(tmp_path: Path) -> None:
    before = open_fds()
    process = subprocess.Popen([*LENDER, str(tmp_path / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    side = Side("tp0", delay_us=1000, chunk_bytes=1 << 20)
    link = side.connect(tmp_path / "s" / "lender.sock")
    link.grow(2)
    refs = side.arena.allocate(60)
    side.fill(np.arange(60), 77)
    copy = side.arena.export(np.arange(60), refs)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert not copy.done()
    copy.result()
    side.fill(np.arange(60), 1)
    side.arena.import_(np.arange(60), refs).result()
    assert side.holds(np.arange(60), 77)
    link._thread.join(timeout=5)
    assert link.lost is not None
    assert "peer closed" in link.lost
    with pytest.raises(ArenaFull):
        side.arena.allocate(1)
    side.arena.check_integrity()
    link.close()
    assert side.arena.check_integrity().total == 0
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    assert settles(lambda: open_fds() == before)


BORROWER = """
import sys, time
from tests.kv.support import Side
side = Side("tp0")
link = side.connect(__import__("pathlib").Path(sys.argv[1]))
link.grow(3)
side.arena.allocate(20)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_borrower_gives_everything_back(tmp_path: Path) -> None:
    lender = make_lender(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", BORROWER, str(lender.path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert lender.check_integrity().free == lender.total_chunks - 3
    process.kill()
    process.wait(timeout=10)
    assert settles(lambda: lender.counts().free == lender.total_chunks)
    assert lender.check_integrity().free == lender.total_chunks
    assert lender.epochs() == {}
    side = Side("tp0")
    link = side.connect(lender)
    assert link.grow(3) == 3
    link.close()
    process.stdout.close()
    lender.close()

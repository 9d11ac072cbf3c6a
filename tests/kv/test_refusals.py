"""What must not get through: each one clear error, nothing mapped, no descriptor kept."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from specgen_engine.kv import wire
from specgen_engine.kv.base import BadMessage, KvError, LeaseRefused, PeerGone
from specgen_engine.kv.borrower import Link
from specgen_engine.kv.lender import Lender, Peer
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.kv.native import _kv
from tests.kv.support import CHUNK_BYTES, Side, make_lender, open_fds, settles

MAGIC = 0x564B4753


@pytest.fixture
def lender(tmp_path: Path) -> Iterator[Lender]:
    made = make_lender(tmp_path)
    yield made
    made.close()


@pytest.fixture
def side() -> Side:
    return Side("tp0")


def frame(payload: bytes, magic: int = MAGIC, announced: int | None = None, fds: int = 0) -> bytes:
    return struct.pack("<III", magic, len(payload) if announced is None else announced, fds) + payload


def test_a_foreign_uid_is_refused(tmp_path: Path, side: Side) -> None:
    lender = make_lender(tmp_path, credentials=lambda sock: Peer(1, os.geteuid() + 1, 0))
    with pytest.raises(LeaseRefused, match=rf"runs as uid {os.geteuid() + 1}.*use one user"):
        side.connect(lender)
    assert lender.check_integrity().free == lender.total_chunks
    lender.close()


def test_a_foreign_lender_is_refused(lender: Lender, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(LeaseRefused, match="the borrower as 4242"):
        side.connect(lender)


def test_a_second_claim_is_refused_and_the_first_lease_stands(lender: Lender, side: Side) -> None:
    link = side.connect(lender)
    link.grow(1)
    with pytest.raises(LeaseRefused, match="already holds the lease of epoch"):
        side.connect(lender)
    assert link.grow(1) == 1
    link.close()


@pytest.mark.parametrize(("field", "value"), [("chunk_bytes", CHUNK_BYTES * 2), ("backend", "cuda"), ("version", 99)])
def test_a_claim_that_does_not_fit_names_the_field(
    lender: Lender, side: Side, field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if field == "chunk_bytes":
        side.arena.chunk_bytes = value  # type: ignore[assignment]
    elif field == "backend":
        monkeypatch.setattr(side.arena.backend, "name", value)
    else:
        monkeypatch.setattr(wire, "PROTOCOL_VERSION", value)
        monkeypatch.setattr("specgen_engine.kv.lender.wire.PROTOCOL_VERSION", 1, raising=False)
        monkeypatch.setattr(Link, "_claim", _claim_of_version_99)
    with pytest.raises(LeaseRefused, match=f"{field}={value!r}: this lender has"):
        side.connect(lender)


def _claim_of_version_99(link: Link) -> object:
    link._channel.send(wire.Claim(1, 99, link.name, "loopback", CHUNK_BYTES))
    answer, _ = link._channel.receive(5)
    assert isinstance(answer, wire.Refused)
    raise LeaseRefused(answer.reason)


def test_a_stale_epoch_is_refused_and_maps_nothing(lender: Lender, side: Side) -> None:
    link = side.connect(lender)
    link.epoch -= 1
    with pytest.raises(LeaseRefused, match=f"epoch {link.epoch} is stale"):
        link.grow(1)
    assert side.arena.check_integrity().total == 0
    assert lender.check_integrity().free == lender.total_chunks
    link.epoch += 1
    link.close()


def test_another_borrowers_epoch_is_refused(lender: Lender, side: Side) -> None:
    owner, thief = side.connect(lender), Side("tp1").connect(lender)
    own, thief.epoch = thief.epoch, owner.epoch
    with pytest.raises(LeaseRefused, match=f"epoch {owner.epoch} is stale: this connection's lease has epoch {own}"):
        thief.grow(1)
    assert owner.chunks == thief.chunks == 0
    thief.epoch = own
    for link in (owner, thief):
        link.close()


def test_an_epoch_of_a_dead_lender_is_below_the_next_ones(tmp_path: Path, side: Side) -> None:
    first = make_lender(tmp_path)
    old = side.connect(first).epoch
    first.crash()
    second = make_lender(tmp_path)
    assert Side("tp1").connect(second).epoch > old
    second.close()


BAD_BYTES = {
    "truncated header": frame(b"")[:7],
    "truncated body": frame(b'{"type":"Renew"', announced=400),
    "wrong magic": frame(b"{}", magic=1),
    "too long": frame(b"", announced=1 << 30),
    "not JSON": frame(b"hello"),
    "unknown type": frame(b'{"type":"Steal","epoch":1}'),
    "missing field": frame(b'{"type":"Grow","seq":1}'),
    "extra field": frame(b'{"type":"Renew","epoch":1,"more":2}'),
    "negative": frame(b'{"type":"Renew","epoch":-1}'),
    "too many chunks": frame(b'{"type":"Grow","seq":1,"epoch":1,"count":65}'),
    "announced descriptors": frame(b'{"type":"Renew","epoch":1}', fds=1),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_bytes_get_one_error_and_the_lender_goes_on(lender: Lender, side: Side, name: str) -> None:
    before = open_fds()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(lender.path))
        sock.sendall(BAD_BYTES[name])
        sock.shutdown(socket.SHUT_WR)
        channel = wire.Channel(sock, wire.FromLender)
        answer = channel.receive(5).message
        assert isinstance(answer, wire.Refused)
        assert answer.seq == 0
        with pytest.raises(PeerGone):
            channel.receive(5)
    assert lender.check_integrity().free == lender.total_chunks
    link = side.connect(lender)
    assert link.grow(1) == 1
    link.close()
    assert settles(lambda: open_fds() == before)


def test_descriptors_with_a_bad_message_are_closed(side: Side) -> None:
    here, there = socket.socketpair()
    before = open_fds()
    chunk = _kv.create_loopback_chunk(CHUNK_BYTES)
    _kv.send_frame(here.fileno(), b'{"type":"Refused","seq":1,"reason":"x"}', [chunk, chunk], 1000)
    with pytest.raises(BadMessage, match="came with 2 descriptors, not 0"):
        wire.Channel(there, wire.FromLender).receive(1)
    os.close(chunk)
    assert open_fds() == before
    here.close()
    there.close()


def test_received_descriptors_are_close_on_exec() -> None:
    here, there = socket.socketpair()
    _kv.send_frame(here.fileno(), b"x", [0], 1000)
    _, fds = _kv.receive_frame(there.fileno(), 1000)
    assert not os.get_inheritable(fds[0])
    for fd in (*fds, here.detach(), there.detach()):
        os.close(fd)


def test_a_peer_that_stops_in_the_middle_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "FRAME_TIMEOUT_MS", 50)
    here, there = socket.socketpair()
    here.sendall(frame(b"abc")[:5])
    with pytest.raises(BadMessage, match="stopped in the middle"):
        wire.Channel(there, wire.FromLender).receive(5)
    here.close()
    there.close()


@pytest.mark.parametrize(("size", "reason"), [(CHUNK_BYTES * 2, "were agreed"), (CHUNK_BYTES // 2, "were agreed")])
def test_a_chunk_of_the_wrong_size_is_not_mapped(side: Side, size: int, reason: str) -> None:
    fd = _kv.create_loopback_chunk(size)
    with pytest.raises(KvError, match=reason):
        side.arena.add_chunk(fd)
    os.close(fd)
    assert side.arena.check_integrity().total == 0


def test_memory_that_its_owner_could_shrink_is_not_mapped(side: Side) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, CHUNK_BYTES)
    with pytest.raises(KvError, match="not sealed"):
        side.arena.add_chunk(fd)
    os.close(fd)


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    with pytest.raises(KvError, match="mode 755: it must be yours, mode 700"):
        make_lender(tmp_path)


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvError, match="the limit is 107"):
        Lender(tmp_path / ("d" * 120), "x", LoopbackBackend(), CHUNK_BYTES, 1)


def test_nobody_listening_is_said_at_once(tmp_path: Path, side: Side) -> None:
    with pytest.raises(PeerGone, match="no lender at"):
        side.connect(tmp_path / "none.sock")

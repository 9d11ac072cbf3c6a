"""The lender: serves chunks of a GPU's spare memory over a Unix socket, and gets them back within a bound.

Runs in the process that owns the memory, on threads of its own. `python -m specgen_engine.kv` runs one alone.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from specgen_engine.kv import wire
from specgen_engine.kv.base import Backend, BadMessage, Chunk, Counts, KvError, LeaseRefused, PeerGone, PeerTimeout
from specgen_engine.kv.lease import LeaseBook
from specgen_engine.kv.native import _kv

log = logging.getLogger(__name__)

MAX_QUIET_S = 5.0
LONGEST_SOCKET_PATH = 107


class RevokeReport(NamedTuple):
    """`seconds` until the last chunk came back, or the bound passed with `outstanding` chunks still out."""

    chunks: int
    outstanding: int
    seconds: float


class Peer(NamedTuple):
    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    return Peer(*_kv.peer_credentials(sock.fileno()))


def private_directory(path: Path) -> Path:
    """Create a directory only this user can enter, or check that it is one. Raises KvError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise KvError(
            f"directory {path} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):o}: "
            "it must be yours, mode 700"
        )
    return path


class _Connection:
    """A borrower's connection, and its lease once it has claimed one."""

    def __init__(self, sock: socket.socket, peer: Peer) -> None:
        self.channel = wire.Channel(sock, wire.FromBorrower)
        self.peer = peer
        self.epoch: int | None = None
        self.quiet_reached = 0


class Lender:
    """Lends `total_chunks` of `chunk_bytes` each; memory exists only while a chunk is lent.

    Args:
        directory: holds the socket; made with mode 700.
        name: the socket is `<name>.sock`; an earlier, dead lender's socket of that name is replaced.
        backend: makes the chunks.
        lease_s: seconds a lease outlives its borrower's last sign of life.
        credentials: who is at the other end of a socket (the kernel's word; a test's stand-in).

    Raises:
        KvError: the directory is open to others, or the path is too long for a socket.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        backend: Backend,
        chunk_bytes: int,
        total_chunks: int,
        lease_s: float = 10.0,
        credentials: Callable[[socket.socket], Peer] = peer_of,
    ) -> None:
        self.path = private_directory(directory) / f"{name}.sock"
        if len(os.fsencode(self.path)) > LONGEST_SOCKET_PATH:
            raise KvError(
                f"socket path {self.path} has {len(os.fsencode(self.path))} bytes: "
                f"the limit is {LONGEST_SOCKET_PATH}, use a shorter one"
            )
        self.backend = backend
        self.chunk_bytes = chunk_bytes
        self.total_chunks = total_chunks
        self._credentials = credentials
        self._book = LeaseBook(total_chunks, lease_s, first_epoch=time.time_ns() // 1000)
        self._chunks: dict[int, Chunk] = {}
        self._connections: list[_Connection] = []
        self._quiet = 0
        self._closing = False
        self._changed = threading.Condition(threading.RLock())
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._acceptor = threading.Thread(target=self._accept, name=f"kv-lender-{name}", daemon=True)
        self._acceptor.start()

    def counts(self) -> Counts:
        with self._changed:
            return self._book.counts()

    def check_integrity(self) -> Counts:
        """Raises KvError unless the books add up and exactly the lent chunks have memory."""
        with self._changed:
            counts = self._book.check_integrity()
            if len(self._chunks) != counts.total - counts.free:
                raise KvError(f"lender: {len(self._chunks)} chunks have memory, {counts.total - counts.free} are lent")
            return counts

    def epochs(self) -> dict[str, int]:
        """The epoch of each borrower's lease."""
        with self._changed:
            return {lease.borrower: lease.epoch for lease in self._book.leases()}

    def revoke(self, epoch: int, count: int | None = None, bound_s: float = 0.05) -> RevokeReport:
        """Call back `count` chunks of a lease, or all, and wait up to `bound_s` for them.

        Chunks that are late stay in revocation and are freed when they do come. Raises LeaseRefused for a stale epoch.
        """
        start = time.monotonic()
        with self._changed:
            chunks = self._book.revoke(epoch, count)
            self._send_revoke(epoch, chunks, bound_s)
            self._changed.wait_for(lambda: not self._outstanding(epoch, chunks), timeout=bound_s)
            return RevokeReport(len(chunks), self._outstanding(epoch, chunks), time.monotonic() - start)

    @contextmanager
    def quiet(self, duration_s: float, reach_s: float = 0.05) -> Iterator[bool]:
        """Suspend all copies for at most `duration_s`; yields whether all copies had drained after `reach_s`.

        Raises KvError for a duration over MAX_QUIET_S: borrowers may be waiting.
        """
        if not 0 < duration_s <= MAX_QUIET_S:
            raise KvError(f"duration_s={duration_s}: use more than 0 and at most {MAX_QUIET_S}")
        with self._changed:
            self._quiet += 1
            number = self._quiet
            leased = [(c, c.epoch) for c in self._connections if c.epoch is not None]
            for connection, epoch in leased:
                self._send(connection, wire.Quiet(epoch, number, duration_s))
            reached = self._changed.wait_for(
                lambda: all(c.quiet_reached >= number or c not in self._connections for c, _ in leased), timeout=reach_s
            )
        try:
            yield reached
        finally:
            with self._changed:
                for connection, epoch in leased:
                    self._send(connection, wire.Resume(epoch, number))

    def close(self, bound_s: float = 1.0) -> None:
        """Call everything back, then end all connections. Idempotent."""
        for epoch in self.epochs().values():
            try:
                self.revoke(epoch, bound_s=bound_s)
            except LeaseRefused:  # ended meanwhile
                continue
        self.crash()

    def crash(self) -> None:
        """End as a killed process would: no goodbye. Borrowers keep what they have mapped."""
        with self._changed:
            self._closing = True
            connections = list(self._connections)
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed before
            pass
        self._listener.close()
        for connection in connections:
            connection.channel.shutdown()
        self._acceptor.join(timeout=5)
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, timeout=5)
            self.path.unlink(missing_ok=True)

    def _outstanding(self, epoch: int, chunks: list[int]) -> int:
        lease = next((lease for lease in self._book.leases() if lease.epoch == epoch), None)
        return len(lease.chunks.intersection(chunks)) if lease else 0

    def _send_revoke(self, epoch: int, chunks: list[int], bound_s: float) -> None:
        connection = next((c for c in self._connections if c.epoch == epoch), None)
        for at in range(0, len(chunks), wire.MAX_CHUNKS_PER_MESSAGE):
            if connection is not None:
                self._send(
                    connection, wire.Revoke(epoch, tuple(chunks[at : at + wire.MAX_CHUNKS_PER_MESSAGE]), bound_s)
                )

    def _send(self, connection: _Connection, message: wire.AnyMessage, fds: list[int] | None = None) -> None:
        """A peer that can't be reached is dropped by its own thread, which sees the end of the connection."""
        try:
            connection.channel.send(message, fds)
        except (PeerGone, PeerTimeout) as error:
            log.info("borrower of epoch %s: %s", connection.epoch, error)
            connection.channel.shutdown()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # the listener was closed
                return
            connection = _Connection(sock, self._credentials(sock))
            with self._changed:
                if self._closing:
                    sock.close()
                    return
                self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), name="kv-lender-connection", daemon=True).start()

    def _serve(self, connection: _Connection) -> None:
        try:
            if connection.peer.uid != os.geteuid():
                raise LeaseRefused(
                    f"process {connection.peer.pid} runs as uid {connection.peer.uid}, "
                    f"the lender as {os.geteuid()}: use one user"
                )
            while True:
                try:
                    message = connection.channel.receive(self._book.lease_s / 2).message
                except PeerTimeout:
                    self._expire(connection)
                    continue
                self._answer(connection, message)
        except (BadMessage, LeaseRefused) as error:
            log.warning("dropping a borrower: %s", error)
            self._send(connection, wire.Refused(0, str(error)))
        except PeerGone:
            pass
        finally:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        with self._changed:
            self._connections.remove(connection)
            if connection.epoch is not None:
                self._release(self._book.end(connection.epoch))
            connection.channel.close()
            self._changed.notify_all()

    def _release(self, chunks: list[int]) -> None:
        for chunk in chunks:
            self._chunks.pop(chunk).release()

    def _expire(self, connection: _Connection) -> None:
        with self._changed:
            for lease in self._book.expired(time.monotonic()):
                if lease.epoch == connection.epoch:
                    log.warning(
                        "borrower %r let its lease of epoch %d lapse: calling its chunks back",
                        lease.borrower,
                        lease.epoch,
                    )
                    self._send_revoke(lease.epoch, self._book.revoke(lease.epoch), self._book.lease_s)

    def _answer(self, connection: _Connection, message: wire.FromBorrower) -> None:
        seq = getattr(message, "seq", 0)
        with self._changed:
            try:
                if isinstance(message, wire.Claim):
                    self._claim(connection, message)
                    return
                if message.epoch != connection.epoch:
                    raise LeaseRefused(
                        f"epoch {message.epoch} is stale: this connection's lease has epoch {connection.epoch}"
                    )
                self._book.renew(message.epoch, time.monotonic())
                self._act(connection, message)
                self._changed.notify_all()
            except LeaseRefused as error:
                if seq == 0:  # nobody waits for an answer: the borrower's books and ours differ
                    raise
                self._send(connection, wire.Refused(seq, str(error)))

    def _act(self, connection: _Connection, message: wire.FromBorrower) -> None:
        if isinstance(message, wire.Grow):
            self._grow(connection, message)
        elif isinstance(message, wire.Accepted):
            self._book.accept(message.epoch, message.chunks)
        elif isinstance(message, wire.Returned):
            self._release(self._book.returned(message.epoch, message.chunks))
        elif isinstance(message, wire.QuietReached):
            connection.quiet_reached = message.quiet
        elif isinstance(message, wire.Close):
            self._release(self._book.end(message.epoch))
            connection.epoch = None
            self._send(connection, wire.Closed(message.seq))

    def _claim(self, connection: _Connection, claim: wire.Claim) -> None:
        wanted = {"version": wire.PROTOCOL_VERSION, "backend": self.backend.name, "chunk_bytes": self.chunk_bytes}
        for name, ours in wanted.items():
            if getattr(claim, name) != ours:
                raise LeaseRefused(f"{name}={getattr(claim, name)!r}: this lender has {ours!r}")
        if connection.epoch is not None:
            raise LeaseRefused(f"this connection already holds the lease of epoch {connection.epoch}")
        lease = self._book.claim(claim.borrower, time.monotonic())
        connection.epoch = lease.epoch
        self._send(connection, wire.Granted(claim.seq, lease.epoch, self._book.lease_s, self.total_chunks))

    def _grow(self, connection: _Connection, grow: wire.Grow) -> None:
        granted = self._book.grant(grow.epoch, grow.count)
        fds: list[int] = []
        try:
            for chunk in granted:
                self._chunks[chunk] = self.backend.chunk(self.chunk_bytes)
                fds.append(self._chunks[chunk].export_fd())
            self._send(connection, wire.Chunks(grow.seq, grow.epoch, tuple(granted)), fds)
        except (RuntimeError, OSError) as error:
            for chunk in self._book.returned(grow.epoch, granted):
                if chunk in self._chunks:
                    self._chunks.pop(chunk).release()
            raise LeaseRefused(f"the device has no memory for {len(granted)} more chunks: {error}") from None
        finally:
            wire.close_all(fds)

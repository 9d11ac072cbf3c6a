"""What lender and borrower say to each other: typed messages, length-prefixed JSON, descriptors beside them.

Everything received is validated here; a descriptor that came with a bad message is closed before the error is raised.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from typing import Annotated, Any, NamedTuple

import msgspec

from specgen_engine.kv.base import BadMessage, PeerGone, PeerTimeout
from specgen_engine.kv.native import _kv

PROTOCOL_VERSION = 1
FRAME_TIMEOUT_MS = 2_000  # from a message's first byte to its last
MAX_CHUNKS_PER_MESSAGE = _kv.MAX_FRAME_FDS

Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNKS_PER_MESSAGE)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
ChunkIds = Annotated[tuple[Whole, ...], msgspec.Meta(min_length=1, max_length=MAX_CHUNKS_PER_MESSAGE)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages. `epoch` names the lease; `seq` pairs a request with its answer."""


class Claim(Message, frozen=True):
    """Borrower: lend me chunks of this size and kind. Answered by Granted or Refused."""

    seq: Whole
    version: int
    borrower: Name
    backend: Name
    chunk_bytes: Whole


class Granted(Message, frozen=True):
    """Lender: the lease is yours until `lease_s` after your last sign of life."""

    seq: Whole
    epoch: Whole
    lease_s: float
    total_chunks: Whole


class Refused(Message, frozen=True):
    """Lender: no, and why. The lease, if there is one, stands."""

    seq: Whole
    reason: str


class Grow(Message, frozen=True):
    """Borrower: more chunks. Answered by Chunks (as many as are free, at least one) or Refused."""

    seq: Whole
    epoch: Whole
    count: Count


class Chunks(Message, frozen=True):
    """Lender: here they are, one descriptor each, in order."""

    seq: Whole
    epoch: Whole
    chunks: ChunkIds


class Accepted(Message, frozen=True):
    """Borrower: these are mapped."""

    epoch: Whole
    chunks: ChunkIds


class Returned(Message, frozen=True):
    """Borrower: these are drained and unmapped, after a Revoke or of its own accord."""

    epoch: Whole
    chunks: ChunkIds


class Revoke(Message, frozen=True):
    """Lender: stop using these, drain, unmap, return them, within `bound_s`."""

    epoch: Whole
    chunks: ChunkIds
    bound_s: float


class Quiet(Message, frozen=True):
    """Lender: no copies for `duration_s`; answered by QuietReached once those in flight have drained."""

    epoch: Whole
    quiet: Whole
    duration_s: float


class QuietReached(Message, frozen=True):
    epoch: Whole
    quiet: Whole


class Resume(Message, frozen=True):
    """Lender: copies may go on before the time is up."""

    epoch: Whole
    quiet: Whole


class Renew(Message, frozen=True):
    """Borrower: a sign of life. Unanswered."""

    epoch: Whole


class Close(Message, frozen=True):
    """Borrower: the end of the lease; every chunk is unmapped. Answered by Closed."""

    seq: Whole
    epoch: Whole


class Closed(Message, frozen=True):
    """Lender: the lease is over; the borrower may claim another."""

    seq: Whole


FromBorrower = Claim | Grow | Accepted | Returned | QuietReached | Renew | Close
FromLender = Granted | Refused | Chunks | Closed | Revoke | Quiet | Resume
AnyMessage = FromBorrower | FromLender


class Received(NamedTuple):
    message: Any  # one of the channel's incoming union
    fds: list[int]


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Channel:
    """One connection. Sends are serialised; only one thread may receive.

    Args:
        sock: a connected Unix stream socket, owned from here on.
        incoming: the union of messages the peer may send.
        send_timeout_ms: bound on a send to a peer that doesn't read.
    """

    def __init__(self, sock: socket.socket, incoming: object, send_timeout_ms: int = 5_000) -> None:
        self._socket = sock
        self._decoder = msgspec.json.Decoder(incoming)
        self._send_lock = threading.Lock()
        self._send_timeout_ms = send_timeout_ms

    def send(self, message: AnyMessage, fds: list[int] | None = None) -> None:
        """Raises PeerGone, PeerTimeout. The descriptors stay the caller's."""
        try:
            with self._send_lock:
                _kv.send_frame(self._fileno(), msgspec.json.encode(message), fds or [], self._send_timeout_ms)
        except _kv.ChannelTimeout as error:
            raise PeerTimeout(f"sending {type(message).__name__}: {error}") from None
        except (_kv.ChannelClosed, _kv.SystemFailure) as error:
            raise PeerGone(f"sending {type(message).__name__}: {error}") from None

    def receive(self, timeout_s: float) -> Received:
        """The next message; the caller owns its descriptors. Raises PeerGone, PeerTimeout, BadMessage."""
        if not self._readable(timeout_s):
            raise PeerTimeout(f"nothing from the peer within {timeout_s} s")
        try:
            payload, fds = _kv.receive_frame(self._fileno(), FRAME_TIMEOUT_MS)
        except _kv.ChannelTimeout:
            raise BadMessage(f"truncated message: the peer stopped in the middle for {FRAME_TIMEOUT_MS} ms") from None
        except (_kv.ChannelClosed, _kv.SystemFailure) as error:
            raise PeerGone(str(error)) from None
        except _kv.ChannelInvalid as error:
            raise BadMessage(str(error)) from None
        try:
            message = self._decoder.decode(payload)
            expected = len(message.chunks) if isinstance(message, Chunks) else 0
            if len(fds) != expected:
                raise BadMessage(f"{type(message).__name__} came with {len(fds)} descriptors, not {expected}")
        except msgspec.DecodeError as error:
            close_all(fds)
            raise BadMessage(f"not a message of this protocol: {error}") from None
        except BadMessage:
            close_all(fds)
            raise
        return Received(message, fds)

    def _readable(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fileno(), select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s * 1000)))

    def _fileno(self) -> int:
        fd = self._socket.fileno()
        if fd < 0:
            raise PeerGone("the connection is closed")
        return fd

    def shutdown(self) -> None:
        """Wake whoever receives: they see PeerGone. The receiving thread closes."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # already closed, by us or the peer
            pass

    def close(self) -> None:
        self._socket.close()

"""The borrower: leases of one arena with any number of lenders."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from specgen_engine.kv import wire
from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import ArenaFull, BadMessage, KvError, LeaseRefused, PeerGone, PeerTimeout
from specgen_engine.kv.native import _kv

log = logging.getLogger(__name__)

OVERDUE_TICK_S = 0.01


class Link:
    """One lease with one lender: connected and claimed when the constructor returns.

    A thread of its own maps chunks as they come, obeys revocations and quiet spells, and renews the lease. If the
    lender dies, `lost` says so: pages of its chunks stay readable until `close`, no new ones are given out.

    `before_return(slots, bound_s)` runs on that thread when the lender calls chunks back, before they are given up:
    the moment to move pages elsewhere.

    Raises:
        PeerGone: nobody listens at `path`.
        LeaseRefused: the lender, or this side's check of the lender's user, says no.
        PeerTimeout: no answer within `timeout_s`.
    """

    def __init__(
        self,
        arena: PageArena,
        path: Path,
        name: str,
        timeout_s: float = 5.0,
        before_return: Callable[[list[int], float], None] | None = None,
    ) -> None:
        self.arena = arena
        self._before_return = before_return
        self.name = name
        self.lost: str | None = None
        self._timeout_s = timeout_s
        self._slots: dict[int, int] = {}  # the lender's chunk -> our slot
        self._overdue: set[int] = set()  # chunks whose copies outlasted a revocation's bound
        self._quiet = 0
        self._quiet_until = 0.0
        self._seq = 0
        self._lock = threading.RLock()
        self._request_lock = threading.Lock()
        self._answers: queue.SimpleQueue[wire.AnyMessage | KvError] = queue.SimpleQueue()
        self._channel = wire.Channel(self._connect(path), wire.FromLender)
        try:
            granted = self._claim()
        except BaseException:
            self._channel.close()
            raise
        self.epoch = granted.epoch
        self.total_chunks = granted.total_chunks
        self._renew_s = granted.lease_s / 3
        self._thread = threading.Thread(target=self._run, name=f"kv-borrower-{name}", daemon=True)
        self._thread.start()

    @property
    def chunks(self) -> int:
        """Chunks mapped under this lease."""
        with self._lock:
            return len(self._slots)

    @property
    def slots(self) -> list[int]:
        with self._lock:
            return sorted(self._slots.values())

    def grow(self, count: int) -> int:
        """Borrow up to `count` more chunks; returns how many came.

        Raises ArenaFull (no slot), LeaseRefused (nothing free, or a stale epoch), PeerGone, PeerTimeout.
        """
        if count < 1:
            raise KvError(f"count={count}: ask for at least one chunk")
        if self.arena.free_slots() < count:
            raise ArenaFull(
                f"{count} chunks asked for, {self.arena.free_slots()} slots free: make the arena with more slots"
            )
        answer = self._request(lambda seq: wire.Grow(seq, self.epoch, min(count, wire.MAX_CHUNKS_PER_MESSAGE)))
        assert isinstance(answer, wire.Chunks)
        return len(answer.chunks)

    def shrink(self, count: int, timeout_s: float = 1.0) -> int:
        """Give back up to `count` chunks that hold no used page; returns how many went."""
        with self._lock:
            unused = [chunk for chunk, slot in self._slots.items() if self.arena.used_in(slot) == 0][:count]
        return len(self._give_back(unused, timeout_s, only_unused=True))

    def close(self, timeout_s: float = 5.0) -> None:
        """Drain, unmap and return everything, used pages too, and end the lease. Idempotent. Raises KvError when copies
        outlast `timeout_s`: call it again."""
        with self._lock:
            chunks = list(self._slots)
        self._give_back(chunks, timeout_s)
        if self.chunks:
            raise KvError(f"{self.chunks} chunks still have copies in flight after {timeout_s} s: close the link again")
        try:
            self._request(lambda seq: wire.Close(seq, self.epoch))
        except (PeerGone, PeerTimeout, LeaseRefused):  # a dead lender, or a lease that had lapsed: nothing left to end
            pass
        self.crash()

    def crash(self) -> None:
        """Drop the connection without a word, as a killed process would; what is mapped stays mapped."""
        self._channel.shutdown()
        self._thread.join(timeout=5)

    def _connect(self, path: Path) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._timeout_s)
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise PeerGone(f"no lender at {path}: {error.strerror or error}") from None
        sock.setblocking(True)
        pid, uid, _ = _kv.peer_credentials(sock.fileno())
        if uid != os.geteuid():
            sock.close()
            raise LeaseRefused(f"lender process {pid} runs as uid {uid}, the borrower as {os.geteuid()}: use one user")
        return sock

    def _claim(self) -> wire.Granted:
        self._seq += 1
        try:
            self._channel.send(
                wire.Claim(self._seq, wire.PROTOCOL_VERSION, self.name, self.arena.backend.name, self.arena.chunk_bytes)
            )
        except PeerGone:  # it may have said why before it hung up
            pass
        answer, fds = self._channel.receive(self._timeout_s)
        wire.close_all(fds)
        if isinstance(answer, wire.Granted):
            return answer
        raise LeaseRefused(
            answer.reason if isinstance(answer, wire.Refused) else f"{type(answer).__name__} in answer to a claim"
        )

    def _request(self, make: Callable[[int], wire.AnyMessage]) -> wire.AnyMessage:
        with self._request_lock:
            if self.lost:
                raise PeerGone(self.lost)
            self._seq += 1
            seq = self._seq
            self._channel.send(make(seq))
            deadline = time.monotonic() + self._timeout_s
            while True:
                try:
                    answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise PeerTimeout(f"no answer from the lender within {self._timeout_s} s") from None
                if isinstance(answer, KvError):
                    raise answer
                if getattr(answer, "seq", None) != seq:  # a late answer to a request that was given up
                    continue
                if isinstance(answer, wire.Refused):
                    raise LeaseRefused(answer.reason)
                return answer

    def _run(self) -> None:
        renew_at = time.monotonic() + self._renew_s
        try:
            while True:
                if time.monotonic() >= renew_at:
                    renew_at = time.monotonic() + self._renew_s
                    self._channel.send(wire.Renew(self.epoch))
                tick = OVERDUE_TICK_S if self._overdue else max(0.0, renew_at - time.monotonic())
                try:
                    received = self._channel.receive(tick)
                except PeerTimeout:
                    self._retry_overdue()
                    continue
                self._handle(received)
        except PeerTimeout as error:
            self._lose(f"lender no longer reads: {error}")
        except (PeerGone, BadMessage) as error:
            self._lose(str(error))
        except LeaseRefused as error:
            self._lose(str(error))
            self._give_back(list(self._slots), self._timeout_s)
        except BaseException as error:
            self._lose(f"the link's thread failed: {error!r}")
            raise
        finally:
            self._channel.close()

    def _lose(self, reason: str) -> None:
        with self._lock:
            self.lost = f"lease of epoch {self.epoch} is over: {reason}"
            self.arena.retire(self._slots.values())
        self._answers.put(PeerGone(self.lost))

    def _handle(self, received: wire.Received) -> None:
        message: wire.FromLender = received.message
        if isinstance(message, wire.Chunks):
            self._map(message, received.fds)
        elif isinstance(message, wire.Refused) and message.seq == 0:
            raise LeaseRefused(message.reason)
        elif isinstance(message, wire.Refused | wire.Closed):
            self._answers.put(message)
        elif message.epoch != self.epoch:
            raise BadMessage(f"{type(message).__name__} for epoch {message.epoch}, this lease has {self.epoch}")
        elif isinstance(message, wire.Revoke):
            wanted = [chunk for chunk in message.chunks if chunk in self._slots]
            start = time.monotonic()
            if self._before_return is not None:
                self._before_return([self._slots[chunk] for chunk in wanted], message.bound_s / 2)
            self._give_back(wanted, max(0.0, message.bound_s - (time.monotonic() - start)))
        elif isinstance(message, wire.Quiet):
            self._be_quiet(message)
        elif isinstance(message, wire.Resume) and message.quiet == self._quiet:
            self._quiet_until = 0.0
            self.arena.resume(self.slots)

    def _map(self, message: wire.Chunks, fds: list[int]) -> None:
        accepted: list[int] = []
        failure: KvError | None = None
        try:
            if message.epoch != self.epoch:
                raise BadMessage(f"chunks for epoch {message.epoch}, this lease has {self.epoch}")
            for chunk, fd in zip(message.chunks, fds, strict=True):
                slot = self.arena.add_chunk(fd)
                with self._lock:
                    self._slots[chunk] = slot
                self.arena.pause([slot], self._quiet_until - time.monotonic())
                accepted.append(chunk)
        except KvError as error:
            failure = error
        finally:
            wire.close_all(fds)
        if isinstance(failure, BadMessage):
            raise failure
        if accepted:
            self._channel.send(wire.Accepted(self.epoch, tuple(accepted)))
        refused = message.chunks[len(accepted) :]
        if refused:
            self._channel.send(wire.Returned(self.epoch, refused))
        self._answers.put(failure or message)

    def _be_quiet(self, message: wire.Quiet) -> None:
        self._quiet = message.quiet
        self._quiet_until = time.monotonic() + message.duration_s
        slots = self.slots
        self.arena.pause(slots, message.duration_s)
        if self.arena.drain(slots, message.duration_s):
            self._channel.send(wire.QuietReached(self.epoch, message.quiet))

    def _give_back(self, chunks: list[int], bound_s: float, only_unused: bool = False) -> list[int]:
        by_slot = {self._slots[chunk]: chunk for chunk in chunks if chunk in self._slots}
        returned: list[int] = []

        def tell(slot: int) -> None:
            with self._lock:
                chunk = by_slot[slot]
                del self._slots[chunk]
                self._overdue.discard(chunk)
            returned.append(chunk)
            try:
                self._channel.send(wire.Returned(self.epoch, (chunk,)))
            except (PeerGone, PeerTimeout):  # dead lender: the memory is free once unmapped
                pass

        self.arena.revoke(by_slot, bound_s, tell, only_unused)
        if not only_unused:
            with self._lock:
                self._overdue.update(chunk for chunk in chunks if chunk in self._slots)
        return returned

    def _retry_overdue(self) -> None:
        if self._overdue:
            self._give_back(list(self._overdue), 0.0)

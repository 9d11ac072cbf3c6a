"""The lender's books: which chunk is free, lent, on its way, or being called back. No sockets, no memory, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from specgen_engine.kv.base import Counts, KvError, LeaseRefused


class ChunkState(Enum):
    FREE = "free"
    IN_FLIGHT = "in flight"  # sent, not yet accepted
    USED = "used"
    REVOKING = "revoking"


@dataclass
class Lease:
    """One borrower's claim. `deadline` is in the caller's clock, seconds."""

    borrower: str
    epoch: int
    deadline: float
    chunks: set[int] = field(default_factory=set)


class LeaseBook:
    """Chunks 0..total-1 and the leases on them.

    Args:
        total: chunks that may be lent.
        lease_s: seconds a lease outlives its borrower's last sign of life.
        first_epoch: above every epoch an earlier lender of this name gave out (its start time in ns, say), so that a
            borrower of a dead lender is told that its epoch is stale.
    """

    def __init__(self, total: int, lease_s: float, first_epoch: int) -> None:
        if total < 1:
            raise KvError(f"total={total}: a lender needs at least one chunk")
        self.lease_s = lease_s
        self._states = [ChunkState.FREE] * total
        self._leases: dict[int, Lease] = {}
        self._next_epoch = first_epoch

    def claim(self, borrower: str, now: float) -> Lease:
        """Raises LeaseRefused when the borrower holds a lease already."""
        for lease in self._leases.values():
            if lease.borrower == borrower:
                raise LeaseRefused(
                    f"borrower {borrower!r} already holds the lease of epoch {lease.epoch}: close that one first"
                )
        lease = Lease(borrower, self._next_epoch, now + self.lease_s)
        self._next_epoch += 1
        self._leases[lease.epoch] = lease
        return lease

    def lease(self, epoch: int) -> Lease:
        """Raises LeaseRefused for an epoch that is not, or no longer, a lease."""
        if epoch not in self._leases:
            raise LeaseRefused(f"epoch {epoch} is stale: the lease has ended, claim a new one")
        return self._leases[epoch]

    def leases(self) -> list[Lease]:
        return list(self._leases.values())

    def renew(self, epoch: int, now: float) -> None:
        self.lease(epoch).deadline = now + self.lease_s

    def expired(self, now: float) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.deadline <= now]

    def grant(self, epoch: int, count: int) -> list[int]:
        """Up to `count` free chunks, now in flight. Raises LeaseRefused when none is free."""
        lease = self.lease(epoch)
        free = [chunk for chunk, state in enumerate(self._states) if state is ChunkState.FREE][:count]
        if not free:
            raise LeaseRefused(f"all {len(self._states)} chunks are lent")
        self._set(free, ChunkState.IN_FLIGHT)
        lease.chunks.update(free)
        return free

    def accept(self, epoch: int, chunks: Iterable[int]) -> None:
        """A chunk that is being revoked meanwhile stays so."""
        for chunk in self._owned(epoch, chunks):
            if self._states[chunk] is ChunkState.IN_FLIGHT:
                self._states[chunk] = ChunkState.USED

    def revoke(self, epoch: int, count: int | None = None) -> list[int]:
        """The lease's chunks to call back: the last `count` lent, or all. Those in revocation already don't count."""
        lease = self.lease(epoch)
        lent = sorted((c for c in lease.chunks if self._states[c] is not ChunkState.REVOKING), reverse=True)
        chosen = lent if count is None else lent[:count]
        self._set(chosen, ChunkState.REVOKING)
        return chosen

    def returned(self, epoch: int, chunks: Iterable[int]) -> list[int]:
        """Chunks that are free again."""
        lease, owned = self.lease(epoch), self._owned(epoch, chunks)
        self._set(owned, ChunkState.FREE)
        lease.chunks.difference_update(owned)
        return owned

    def end(self, epoch: int) -> list[int]:
        """End a lease whose borrower has unmapped everything or died; its chunks are free again. Idempotent."""
        lease = self._leases.pop(epoch, None)
        if lease is None:
            return []
        self._set(lease.chunks, ChunkState.FREE)
        return sorted(lease.chunks)

    def counts(self) -> Counts:
        number = {state: self._states.count(state) for state in ChunkState}
        return Counts(
            number[ChunkState.FREE],
            number[ChunkState.USED],
            number[ChunkState.IN_FLIGHT],
            number[ChunkState.REVOKING],
            len(self._states),
        )

    def check_integrity(self) -> Counts:
        """Raises KvError unless each lent chunk belongs to exactly one lease and no free one does."""
        counts = self.counts()
        counts.check("lender")
        owners = [chunk for lease in self._leases.values() for chunk in lease.chunks]
        lent = [chunk for chunk, state in enumerate(self._states) if state is not ChunkState.FREE]
        if sorted(owners) != lent:
            raise KvError(f"lender: leases own chunks {sorted(owners)}, the book says {lent} are lent")
        return counts

    def _owned(self, epoch: int, chunks: Iterable[int]) -> list[int]:
        lease, chunks = self.lease(epoch), list(chunks)
        foreign = [chunk for chunk in chunks if chunk not in lease.chunks]
        if foreign:
            raise LeaseRefused(f"chunks {foreign} are not lent under epoch {epoch}")
        return chunks

    def _set(self, chunks: Iterable[int], state: ChunkState) -> None:
        for chunk in chunks:
            self._states[chunk] = state

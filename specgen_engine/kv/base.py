"""The contract of the KV transport: what its parts exchange, what they raise, what a backend must offer.

A *lender* owns spare memory of a GPU and lends it in equal *chunks*; a *borrower* maps the chunks into an *arena* of
pages and moves KV pages there (export) and back (import). A *lease* is the contract between one borrower and one
lender, named by its *epoch*.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from specgen_engine.errors import SpecGenError


class KvError(SpecGenError):
    """Base of all errors of the KV transport."""


class BadMessage(KvError):
    """A peer sent bytes that are no message of the protocol; the connection is closed, nothing was mapped."""


class PeerGone(KvError):
    """The peer closed the connection or died."""


class PeerTimeout(KvError):
    """The peer did not answer within the bound."""


class LeaseRefused(KvError):
    """The lender refused: foreign user, second claim, wrong chunk size, nothing free, or a stale epoch."""


class ArenaFull(KvError):
    """Fewer pages or slots are free than asked for."""


class QuietLease(KvError):
    """The lender has suspended copies to and from its memory; ask again later, or with quiet="wait"."""


class CopyTimeout(KvError):
    """A copy did not finish within the bound."""


class StalePages(KvError):
    """Pages whose generation has passed: their bytes must not be used.

    Attributes:
        positions: positions in the list of pages that was given, ascending.
    """

    def __init__(self, positions: NDArray[np.int64], message: str) -> None:
        super().__init__(message)
        self.positions = positions


class PageRefs(NamedTuple):
    """Arena pages and the generations they were given out with: a page given out again has another one."""

    pages: NDArray[np.int64]
    generations: NDArray[np.uint64]

    def __len__(self) -> int:  # the number of pages, not of fields
        return len(self.pages)

    def take(self, positions: NDArray[np.int64] | slice) -> PageRefs:
        return PageRefs(self.pages[positions], self.generations[positions])


class Counts(NamedTuple):
    """Pages of an arena, or chunks of a lender; free + used + in_flight + revoking = total."""

    free: int
    used: int
    in_flight: int
    revoking: int
    total: int

    def check(self, owner: str) -> None:
        """Raises KvError when the parts don't add up to the total."""
        parts = self.free + self.used + self.in_flight + self.revoking
        if parts != self.total or min(self) < 0:
            raise KvError(f"{owner}: {self} adds up to {parts}, not {self.total}")


class Chunk(Protocol):
    """Lent memory, as the lender holds it."""

    def export_fd(self) -> int:
        """A new descriptor of the memory; the caller closes it."""

    def release(self) -> None:
        """Drop the lender's hold; the memory itself goes when the last mapping and descriptor do. Idempotent."""


class Space(Protocol):
    """An address range of the borrower, with a slot for each chunk."""

    @property
    def base(self) -> int: ...

    @property
    def mapped(self) -> int:
        """Slots that hold a chunk."""

    def map(self, slot: int, fd: int) -> None:
        """Map a chunk; keeps no descriptor. Raises ValueError or RuntimeError, having mapped nothing."""

    def unmap(self, slot: int) -> None:
        """Undo `map`; the caller has drained all copies that touch the slot."""


class Copier(Protocol):
    """Copies pages in order of submission; see csrc/copy for the two implementations."""

    def submit(
        self,
        direction: Any,
        device_pages: NDArray[np.int64],
        arena_pages: NDArray[np.int64],
        generations: NDArray[np.uint64],
        after_stream: int = 0,
    ) -> int: ...

    def done(self, ticket: int) -> bool: ...

    def wait(self, ticket: int, timeout_ms: int) -> bool: ...

    def take_flags(self, ticket: int) -> NDArray[np.int32]: ...


class Backend(Protocol):
    """The kind of memory both sides use: shared memory (loopback) or a GPU's."""

    name: str

    def chunk(self, chunk_bytes: int) -> Chunk: ...

    def space(self, slots: int, chunk_bytes: int) -> Space: ...

    def copier(self, layout: Any, base: int) -> Copier: ...

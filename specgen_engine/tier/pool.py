"""HiCache's second level in an arena: logical pages as SGLang counts them, each backed by an arena page or lost.

Logical indices are the same on all tensor-parallel ranks, since all ranks ask in the same order. Which arena page backs
one, and whether it still does, is each rank's own affair until the ranks agree on it (`cache.py`).
"""

from __future__ import annotations

import logging
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.pool_host.base import HostKVCache, synchronized

from specgen_engine.kv.arena import PageArena
from specgen_engine.kv.base import KvError, PageRefs, QuietLease, StalePages
from specgen_engine.kv.hold import Hold, allocatable, current, hold
from specgen_engine.kv.native import _kv
from specgen_engine.kv.tags import places
from specgen_engine.tier.base import PageShape
from specgen_engine.tier.metrics import Stats
from specgen_engine.tier.movers import PageMover

logger = logging.getLogger(__name__)

NO_PAGE = -1


class Restore(NamedTuple):
    """The longest readable prefix of pages that were asked for, kept from revocation by `held` (None: nothing is)."""

    pages: int
    held: Hold | None
    quiet: bool


class ArenaPool(HostKVCache):
    """The pool that HiRadixCache and its controller see.

    Args:
        device_pool: SGLang's KV pool.
        shape: what its pages are made of.
        arena: of pages of that shape.
        mover: moves them between the device pool and the arena.
        page_num: logical pages; how many of them may be used at once follows the arena, see `limit`.
        stats: counts what happens.
    """

    def __init__(
        self, device_pool: Any, shape: PageShape, arena: PageArena, mover: PageMover, page_num: int, stats: Stats
    ) -> None:
        self.device_pool = device_pool
        self.pool_label = "specgen"
        self.page_size = shape.page_size
        self.page_num = page_num
        self.size = page_num * shape.page_size
        self.layout = "page_first"
        self.pin_memory = False
        self.device = "cpu"
        self.can_use_write_back_jit = False
        self.layer_num = shape.layers
        self.start_layer, self.end_layer = device_pool.start_layer, device_pool.end_layer
        self.shape = shape
        self.dtype = device_pool.store_dtype
        self.size_per_token = self.get_size_per_token()
        self.kv_buffer = None
        self.fd = None
        self.arena = arena
        self.mover = mover
        self.stats = stats
        self.limit = page_num
        self.lock = threading.RLock()
        self._arena_pages = np.full(page_num, NO_PAGE, np.int64)
        self._backed = 0  # logical pages with an arena page
        self._generations = np.zeros(page_num, np.uint64)
        self._freed_in_flight: list[PageRefs] = []
        self._waiting: list[Hold] = []  # pages of restores that the controller has not started yet
        self._revocations_seen = 0
        self._suspect = False
        self.clear()

    # ---- what HostKVCache asks for

    def get_size_per_token(self) -> int:
        return self.shape.page_bytes // self.shape.page_size

    def get_ksize_per_token(self) -> int:
        return self.get_size_per_token() // self.shape.planes_per_layer

    def init_kv_buffer(self) -> None:
        """The pages are in the arena: no tensor of this process holds them."""
        return None

    def destroy(self) -> None:
        """Nothing of this process is registered with the driver."""

    def used_pages(self) -> int:
        """Logical pages that are given out."""
        return self.page_num - (len(self.free_slots) + self.num_release_slots) // self.page_size

    @synchronized
    def clear(self) -> None:
        super().clear()
        for held in self._waiting:
            held.release()
        self._waiting.clear()
        self._give_back(np.flatnonzero(self._arena_pages != NO_PAGE))

    @synchronized
    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Logical indices, of which those without room in the arena count as lost. None beyond the agreed limit."""
        if self.used_pages() + need_size // self.page_size > self.limit:
            return None
        indices = super().alloc(need_size)
        if indices is not None:
            self._back(self._pages_of(indices))
        return indices

    @synchronized
    def free(self, indices: torch.Tensor) -> int:
        count = super().free(indices)
        if count:
            self._give_back(self._pages_of(indices))
        return count

    def backup_from_device_all_layer(
        self, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> None:
        """Export the pages that have an arena page; the others stay lost."""
        pages = self._pages_of(host_indices)
        refs = self._refs(pages)
        for _ in range(3):  # a revocation may come between looking and holding
            here = np.flatnonzero(current(self.arena, refs))
            self._suspect |= len(here) < len(refs)
            try:
                if len(here):
                    self.mover.export(device_indices, here, refs.take(here))
                    self.stats.add("written_bytes", len(here) * self.shape.page_bytes)
                return
            except StalePages:
                continue
            except QuietLease:
                break
        self._lose(pages)

    def load_to_device_per_layer(
        self, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, layer_id: int, io_backend: str
    ) -> None:
        """Import one layer of pages that `begin_restore` holds; the first layer starts the transfer."""
        if layer_id == 0:
            with self.lock:
                held, self._waiting = self._waiting, []
            self.mover.begin_import(device_indices, held)
        self.mover.import_layer(layer_id)

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """A page's bytes for a storage backend, through host memory. Raises StalePages when they are lost."""
        return self.mover.read_page(self._refs(self._pages_of(torch.as_tensor([int(index)]), step=1)))

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self.shape.page_bytes, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: Any, data_page: torch.Tensor) -> None:
        """A page's bytes from a storage backend; dropped when the page has no arena page any more."""
        page = self._pages_of(torch.as_tensor([int(index)]), step=1)
        try:
            self.mover.write_page(self._refs(page), data_page)
        except (StalePages, QuietLease):
            self._lose(page)

    # ---- restores

    @synchronized
    def begin_restore(self, host_indices: torch.Tensor) -> Restore:
        """Keep as many leading pages as can be read, with their tags checked."""
        pages = self._pages_of(host_indices)
        count = len(pages)
        while count:
            refs = self._refs(pages[:count])
            where = places(self.arena, refs)
            try:
                held = hold(self.arena, refs, _kv.Direction.IMPORT, where=where)
            except QuietLease:
                return Restore(0, None, True)
            except StalePages as error:
                count = int(error.positions[0])
                continue
            wrong = self.arena.tags.wrong(refs, where)
            if len(wrong) == 0:
                return Restore(count, held, False)
            held.release()
            logger.warning("%d pages of the remote KV tier hold other bytes than were written there", len(wrong))
            self.stats.add("mismatched_pages", len(wrong))
            self._lose(pages[wrong])
            count = int(wrong[0])
        return Restore(0, None, False)

    @synchronized
    def await_start(self, held: Hold) -> None:
        """The next start of loading reads these pages."""
        self._waiting.append(held)

    # ---- losses and capacity

    @synchronized
    def lost_pages(self) -> NDArray[np.int64]:
        """Used logical pages that this rank can't read any more."""
        self.arena.tags.forget()  # once a step: what is read again is no older than the step
        self.mover.settle()
        self._retry_releases()
        if self.arena.revocations == self._revocations_seen and not self._suspect:
            return np.empty(0, np.int64)
        self._revocations_seen = self.arena.revocations
        used = np.flatnonzero(self.slot_used[:: self.page_size].numpy())
        lost = used[(self._arena_pages[used] == NO_PAGE) | ~current(self.arena, self._refs(used))]
        self._suspect = len(lost) > 0
        self._give_back(lost)
        return lost

    def capacity(self) -> int:
        """Pages that can be backed: those that are, and those that could be allocated."""
        with self.lock:
            return min(self.page_num, self._backed + allocatable(self.arena))

    @synchronized
    def move(self, old: PageRefs, new: PageRefs) -> int:
        """Back the logical pages of `old` by `new`; returns how many there still were."""
        order = np.argsort(old.pages)
        owners = np.flatnonzero(np.isin(self._arena_pages, old.pages))
        at = order[np.searchsorted(old.pages[order], self._arena_pages[owners])]
        same = self._generations[owners] == old.generations[at]
        owners, at = owners[same], at[same]
        self._arena_pages[owners], self._generations[owners] = new.pages[at], new.generations[at]
        self._release(new.take(np.setdiff1d(np.arange(len(new)), at)))
        self._release(old.take(at))
        return len(owners)

    def check_integrity(self) -> dict[str, int]:
        """Arena and pool agree on every page. Raises KvError with the counts that differ."""
        with self.lock:
            self._retry_releases()
            counts = self.arena.check_integrity()
            used = self.slot_used[:: self.page_size].numpy()
            backed = self._arena_pages != NO_PAGE
            if self._backed != int(backed.sum()):
                raise KvError(f"tier: {int(backed.sum())} logical pages are backed, {self._backed} were counted")
            if bool((backed & ~used).any()):
                raise KvError(f"tier: {int((backed & ~used).sum())} arena pages back logical pages that are free")
            live = int(np.count_nonzero(current(self.arena, self._refs(np.flatnonzero(backed)))))
            held = counts.used + counts.in_flight
            pending = sum(len(refs) for refs in self._freed_in_flight)
            if not live <= held <= live + pending:
                raise KvError(f"tier: {live} pages backed and {pending} waiting to be freed, the arena holds {held}")
            return {**counts._asdict(), "backed": live, "limit": self.limit, "logical": int(used.sum())}

    def _pages_of(self, indices: torch.Tensor, step: int = 0) -> NDArray[np.int64]:
        if self.page_size == 1:
            return indices.cpu().numpy()
        return indices[:: step or self.page_size].cpu().numpy() // self.page_size

    def _refs(self, pages: NDArray[np.int64]) -> PageRefs:
        with self.lock:
            arena_pages, generations = self._arena_pages.take(pages), self._generations.take(pages)
        return PageRefs(np.maximum(arena_pages, 0), generations)  # without an arena page: 0, of generation 0

    def _back(self, pages: NDArray[np.int64]) -> None:
        self._retry_releases()
        room = min(len(pages), allocatable(self.arena))
        self._suspect |= room < len(pages)
        if room:
            refs = self.arena.allocate(room)
            self._arena_pages[pages[:room]], self._generations[pages[:room]] = refs.pages, refs.generations
            self._backed += room

    def _lose(self, pages: NDArray[np.int64]) -> None:
        with self.lock:
            self._give_back(pages)
            self._suspect = True

    def _give_back(self, pages: NDArray[np.int64]) -> None:
        backed = pages[self._arena_pages[pages] != NO_PAGE]
        refs = self._refs(backed)
        self._arena_pages[backed], self._generations[backed] = NO_PAGE, 0
        self._backed -= len(backed)
        self._release(refs)

    def _release(self, refs: PageRefs) -> None:
        if len(refs) == 0:
            return
        try:
            self.arena.release(refs)
        except ValueError:  # a copy is in flight
            self._freed_in_flight.append(refs)

    def _retry_releases(self) -> None:
        waiting, self._freed_in_flight = self._freed_in_flight, []
        for refs in waiting:
            self._release(refs)


class PartArenaPool(ArenaPool):
    """One index space of a pool that has several; SGLang's group of host pools gives it its indices as they are."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.can_use_write_back_jit = True  # else the group moves host indices to the GPU before a write

    def available_size(self) -> int:
        """Tokens that `alloc` would give out; UnifiedRadixCache evicts only where it sees too few.

        The agreed limit may have fallen below what is used.
        """
        return max(0, min(self.page_num, self.limit) - self.used_pages()) * self.page_size


class MHAArenaPool(ArenaPool):
    """K and V of each layer."""


class MLAArenaPool(ArenaPool):
    """The latent of each layer, the same on all ranks."""

    def get_contiguous_buf_infos(self) -> Any:
        raise KvError("the remote KV tier has no host buffers to register: leave out disaggregation")

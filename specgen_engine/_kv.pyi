"""
KV transport: channels, page bookkeeping, shared memory and page copies. The Python face is specgen_engine.kv.
"""

from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing

__all__: list[str] = [
    "ArenaLayout",
    "ChannelClosed",
    "ChannelInvalid",
    "ChannelTimeout",
    "CopyConfig",
    "CopyPath",
    "CudaChunk",
    "CudaCopier",
    "CudaSpace",
    "DeviceTables",
    "Direction",
    "HAS_CUDA",
    "LoopbackCopier",
    "LoopbackSpace",
    "MAX_FRAME_BYTES",
    "MAX_FRAME_FDS",
    "PAGE_MATCHES",
    "PAGE_STALE",
    "PageLayout",
    "PageLedger",
    "Plane",
    "SystemFailure",
    "UsageError",
    "check_copy_config",
    "copy_batch",
    "copy_contiguous",
    "create_loopback_chunk",
    "device_count",
    "pages_in_chunk",
    "peer_credentials",
    "plan_page_layout",
    "plan_staging",
    "plan_tiles",
    "receive_frame",
    "select_copy_config",
    "select_copy_path",
    "select_planes",
    "send_frame",
]

class UsageError(ValueError):
    pass

class SystemFailure(RuntimeError):
    pass

class ChannelClosed(ConnectionError):
    pass

class ChannelTimeout(TimeoutError):
    pass

class ChannelInvalid(ValueError):
    pass

class PageLedger:
    """
    Which arena pages are free, used, in flight or being revoked.
    """
    def __init__(
        self,
        slots: typing.SupportsInt | typing.SupportsIndex,
        pages_per_chunk: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def add_chunk(self, slot: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def allocate(self, count: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.int64]: ...
    def begin_copy(
        self,
        pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        generations: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
    ) -> numpy.typing.NDArray[numpy.uint32]: ...
    def check_integrity(self) -> None: ...
    def copies_in(self, slot: typing.SupportsInt | typing.SupportsIndex) -> int: ...
    def counts(self) -> tuple[int, int, int, int, int]: ...
    def end_copy(self, pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64]) -> None: ...
    def generations(
        self, pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64]
    ) -> numpy.typing.NDArray[numpy.uint64]: ...
    def is_mapped(self, slot: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def pause_chunk(self, slot: typing.SupportsInt | typing.SupportsIndex, paused: bool) -> None: ...
    def release(
        self,
        pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        generations: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
    ) -> int: ...
    def remove_chunk(self, slot: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def revoke_chunk(self, slot: typing.SupportsInt | typing.SupportsIndex) -> int: ...

class LoopbackSpace:
    """
    Chunks of shared memory mapped side by side.
    """
    def __init__(
        self, slots: typing.SupportsInt | typing.SupportsIndex, chunk_bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def map(
        self, slot: typing.SupportsInt | typing.SupportsIndex, fd: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def unmap(self, slot: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def base(self) -> int: ...
    @property
    def mapped(self) -> int: ...

class Direction:
    """
    Members:

      EXPORT

      IMPORT
    """

    EXPORT: typing.ClassVar[Direction]
    IMPORT: typing.ClassVar[Direction]
    __members__: typing.ClassVar[dict[str, Direction]]
    @typing.overload
    def __eq__(self, other: Direction) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: Direction) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class ArenaLayout:
    """
    Members:

      LAYER_FIRST

      PAGE_FIRST
    """

    LAYER_FIRST: typing.ClassVar[ArenaLayout]
    PAGE_FIRST: typing.ClassVar[ArenaLayout]
    __members__: typing.ClassVar[dict[str, ArenaLayout]]
    @typing.overload
    def __eq__(self, other: ArenaLayout) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: ArenaLayout) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class CopyPath:
    """
    How bytes travel: see csrc/copy/copy_path.hpp.

    Members:

      AUTO

      DIRECT

      ENGINE

      STAGED
    """

    AUTO: typing.ClassVar[CopyPath]
    DIRECT: typing.ClassVar[CopyPath]
    ENGINE: typing.ClassVar[CopyPath]
    STAGED: typing.ClassVar[CopyPath]
    __members__: typing.ClassVar[dict[str, CopyPath]]
    @typing.overload
    def __eq__(self, other: CopyPath) -> bool: ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool: ...
    def __getstate__(self) -> int: ...
    def __hash__(self) -> int: ...
    def __index__(self) -> int: ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __int__(self) -> int: ...
    @typing.overload
    def __ne__(self, other: CopyPath) -> bool: ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    def __str__(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Plane:
    """
    A device buffer with one row a page: address, bytes from row to row, bytes that travel.
    """
    def __init__(
        self,
        base: typing.SupportsInt | typing.SupportsIndex,
        stride: typing.SupportsInt | typing.SupportsIndex,
        bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    @property
    def base(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def stride(self) -> int: ...

class PageLayout:
    """
    Where a page's bytes lie in an arena chunk.
    """
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def pages_per_chunk(self) -> int: ...
    @property
    def segments_per_page(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def tag_offset(self) -> int: ...

class CopyConfig:
    """
    The kernel and launch shape of a transfer.
    """
    def __init__(
        self,
        method: str,
        sms: typing.SupportsInt | typing.SupportsIndex,
        warps: typing.SupportsInt | typing.SupportsIndex,
        stages: typing.SupportsInt | typing.SupportsIndex,
        stage_bytes: typing.SupportsInt | typing.SupportsIndex,
        tiles_per_warp: typing.SupportsInt | typing.SupportsIndex = 1,
        max_gbps: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    ) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def max_gbps(self) -> float: ...
    @property
    def method(self) -> str: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def sms(self) -> int: ...
    @property
    def stage_bytes(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def tiles_per_warp(self) -> int: ...
    @property
    def warps(self) -> int: ...

class LoopbackCopier:
    """
    Page copies in host memory, in order, on a thread of its own.
    """
    def __init__(
        self,
        layout: PageLayout,
        arena_base: typing.SupportsInt | typing.SupportsIndex,
        page_delay_us: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None: ...
    def done(self, ticket: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def submit(
        self,
        direction: Direction,
        device_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        arena_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        generations: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        after_stream: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int: ...
    def take_flags(self, ticket: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.int32]: ...
    def wait(
        self, ticket: typing.SupportsInt | typing.SupportsIndex, timeout_ms: typing.SupportsInt | typing.SupportsIndex
    ) -> bool: ...

class CudaChunk:
    """
    Physical memory on a lender's device.
    """
    def __init__(
        self, device: typing.SupportsInt | typing.SupportsIndex, bytes: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def export_fd(self) -> int:
        """
        A new descriptor; the caller closes it.
        """
    def release(self) -> None: ...

class CudaSpace:
    """
    Chunks of peer memory mapped side by side for one device.
    """
    def __init__(
        self,
        device: typing.SupportsInt | typing.SupportsIndex,
        slots: typing.SupportsInt | typing.SupportsIndex,
        chunk_bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def map(
        self, slot: typing.SupportsInt | typing.SupportsIndex, fd: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def unmap(self, slot: typing.SupportsInt | typing.SupportsIndex) -> None: ...
    @property
    def base(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def mapped(self) -> int: ...

class DeviceTables:
    """
    Device addresses of a prepared transfer's page tables.
    """
    def __init__(
        self,
        device_pages: typing.SupportsInt | typing.SupportsIndex,
        arena_pages: typing.SupportsInt | typing.SupportsIndex,
        generations: typing.SupportsInt | typing.SupportsIndex,
        flags: typing.SupportsInt | typing.SupportsIndex,
        pages: typing.SupportsInt | typing.SupportsIndex,
        index_stride: typing.SupportsInt | typing.SupportsIndex = 1,
    ) -> None: ...

class CudaCopier:
    """
    Page copies on a stream of its own; large page-first ones through local staging memory.
    """
    def __init__(
        self,
        layout: PageLayout,
        arena_base: typing.SupportsInt | typing.SupportsIndex,
        device: typing.SupportsInt | typing.SupportsIndex,
        sm_budget: typing.SupportsInt | typing.SupportsIndex = 16,
        max_gbps: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        timeout_ms: typing.SupportsInt | typing.SupportsIndex = 10000,
        staging_bytes: typing.SupportsInt | typing.SupportsIndex = 0,
        staging_engines: typing.SupportsInt | typing.SupportsIndex = 2,
    ) -> None: ...
    def done(self, ticket: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def launch(
        self,
        direction: Direction,
        tables: DeviceTables,
        config: CopyConfig,
        stream: typing.SupportsInt | typing.SupportsIndex,
        lane: typing.SupportsInt | typing.SupportsIndex = 1,
    ) -> None: ...
    def order_after(
        self, ticket: typing.SupportsInt | typing.SupportsIndex, stream: typing.SupportsInt | typing.SupportsIndex
    ) -> None: ...
    def path_for(self, pages: typing.SupportsInt | typing.SupportsIndex) -> CopyPath:
        """
        What AUTO stands for with so many pages.
        """
    def select(self, direction: Direction, pages: typing.SupportsInt | typing.SupportsIndex) -> CopyConfig: ...
    def submit(
        self,
        direction: Direction,
        device_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        arena_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
        generations: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
        after_stream: typing.SupportsInt | typing.SupportsIndex = 0,
        path: CopyPath = ...,
    ) -> int: ...
    def take_flags(self, ticket: typing.SupportsInt | typing.SupportsIndex) -> numpy.typing.NDArray[numpy.int32]: ...
    def wait(
        self, ticket: typing.SupportsInt | typing.SupportsIndex, timeout_ms: typing.SupportsInt | typing.SupportsIndex
    ) -> bool: ...
    @property
    def stream(self) -> int: ...

def check_copy_config(config: CopyConfig, slot_bytes: typing.SupportsInt | typing.SupportsIndex) -> None: ...
def copy_batch(
    targets: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
    sources: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
    sizes: typing.Annotated[numpy.typing.ArrayLike, numpy.uint64],
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def copy_contiguous(
    target: typing.SupportsInt | typing.SupportsIndex,
    source: typing.SupportsInt | typing.SupportsIndex,
    bytes: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def create_loopback_chunk(bytes: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Descriptor of sealed shared memory; the caller closes it.
    """

def device_count() -> int:
    """
    CUDA devices here; 0 without a driver.
    """

def pages_in_chunk(
    chunk_bytes: typing.SupportsInt | typing.SupportsIndex, page_bytes: typing.SupportsInt | typing.SupportsIndex
) -> int: ...
def peer_credentials(socket: typing.SupportsInt | typing.SupportsIndex) -> tuple[int, int, int]:
    """
    (pid, uid, gid) of the process at the other end of a Unix socket, by the kernel's word.
    """

def plan_page_layout(
    planes: collections.abc.Sequence[Plane],
    layout: ArenaLayout,
    chunk_bytes: typing.SupportsInt | typing.SupportsIndex,
    max_segment_bytes: typing.SupportsInt | typing.SupportsIndex = 8192,
) -> PageLayout:
    """
    Cut a page into segments. Raises UsageError naming the plane and the value.
    """

def plan_staging(
    arena_pages: typing.Annotated[numpy.typing.ArrayLike, numpy.int64],
    pages_per_chunk: typing.SupportsInt | typing.SupportsIndex,
    piece_pages: typing.SupportsInt | typing.SupportsIndex,
    most_runs: typing.SupportsInt | typing.SupportsIndex,
) -> tuple[numpy.typing.NDArray[numpy.uint32], list[tuple[int, int]], int]:
    """
    (order, (first, pages) of each run, pages packed): which pages the copy engine carries.
    """

def plan_tiles(
    pages: typing.SupportsInt | typing.SupportsIndex,
    segments_per_page: typing.SupportsInt | typing.SupportsIndex,
    workers: typing.SupportsInt | typing.SupportsIndex,
    per_worker: typing.SupportsInt | typing.SupportsIndex,
) -> list[tuple[int, int]]:
    """
    (first, end) of each tile's segments, as the kernels cut a transfer.
    """

def receive_frame(
    socket: typing.SupportsInt | typing.SupportsIndex, timeout_ms: typing.SupportsInt | typing.SupportsIndex
) -> tuple[bytes, list]:
    """
    (payload, descriptors) of the next message; the caller owns the close-on-exec descriptors. Raises ChannelClosed, ChannelInvalid, ChannelTimeout.
    """

def select_copy_config(
    slot_bytes: typing.SupportsInt | typing.SupportsIndex,
    total_bytes: typing.SupportsInt | typing.SupportsIndex,
    direction: Direction,
    sm_budget: typing.SupportsInt | typing.SupportsIndex,
) -> CopyConfig: ...
def select_copy_path(
    total_bytes: typing.SupportsInt | typing.SupportsIndex, pieces_fit: bool, paced: bool
) -> CopyPath: ...
def select_planes(
    layout: PageLayout,
    first: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
) -> PageLayout:
    """
    Some of a page's planes, where they lie in the whole page: for copies layer by layer. A part can't be selected from again.
    """

def send_frame(
    socket: typing.SupportsInt | typing.SupportsIndex,
    payload: bytes,
    fds: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    timeout_ms: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    Send one length-prefixed message with file descriptors. Raises ChannelClosed, ChannelTimeout, UsageError.
    """

HAS_CUDA: bool = True
MAX_FRAME_BYTES: int = 1048576
MAX_FRAME_FDS: int = 64
PAGE_MATCHES: int = 1
PAGE_STALE: int = 2

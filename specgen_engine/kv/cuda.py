"""The transport over a peer GPU's memory: cuMemCreate chunks, one kernel a copy, or SMs and copy engine."""

from __future__ import annotations

from specgen_engine.kv.base import KvError
from specgen_engine.kv.native import _kv


class CudaBackend:
    """Memory of GPU `device`: the lender's own when it makes chunks, the borrower's own when it maps and copies.

    Args:
        device: CUDA ordinal in this process.
        sm_budget: SMs a copy may occupy on the borrower.
        max_gbps: pace of each copy in 1e9 bytes a second; 0 for as fast as it goes.
        copy_timeout_ms: bound on a single load inside a copy; beyond it the kernel traps.
        staging_bytes: memory of `device` through which large copies of page-first arenas go, packed by SMs and carried
            by the copy engine; taken when an arena is made. 0: every copy is one kernel.

    Raises:
        KvError: the extension has no CUDA part, or there is no such device.
    """

    name = "cuda"

    def __init__(
        self,
        device: int,
        sm_budget: int = 16,
        max_gbps: float = 0.0,
        copy_timeout_ms: int = 10_000,
        staging_bytes: int = 0,
    ) -> None:
        if not _kv.HAS_CUDA:
            raise KvError(
                "the extension was built without CUDA: install nvcc (nvidia-cuda-nvcc) and nvidia-cutlass, then rebuild"
            )
        count = _kv.device_count()
        if not 0 <= device < count:
            raise KvError(f"device={device}: this process sees {count} CUDA devices")
        self.device = device
        self.sm_budget = sm_budget
        self.max_gbps = max_gbps
        self.copy_timeout_ms = copy_timeout_ms
        self.staging_bytes = staging_bytes

    def chunk(self, chunk_bytes: int) -> _kv.CudaChunk:
        return _kv.CudaChunk(self.device, chunk_bytes)

    def space(self, slots: int, chunk_bytes: int) -> _kv.CudaSpace:
        return _kv.CudaSpace(self.device, slots, chunk_bytes)

    def copier(self, layout: _kv.PageLayout, base: int) -> _kv.CudaCopier:
        return _kv.CudaCopier(
            layout, base, self.device, self.sm_budget, self.max_gbps, self.copy_timeout_ms, self.staging_bytes
        )

#include "page_copy.hpp"
#include "page_copy_bulk.cuh"
#include "page_copy_vector.cuh"

namespace specgen {

cudaError_t prepare_page_copy(uint32_t shared_bytes) {
    // Asking for a kernel's attributes loads it: a first launch under stream capture must not.
    cudaFuncAttributes attributes{};
    const cudaError_t loaded = cudaFuncGetAttributes(&attributes, copy_pages_by_vector);
    if (loaded != cudaSuccess) return loaded;
    const cudaError_t marks_loaded = cudaFuncGetAttributes(&attributes, mark_pages);
    if (marks_loaded != cudaSuccess) return marks_loaded;
    return cudaFuncSetAttribute(copy_pages_by_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
}

cudaError_t launch_page_copy(const PageTransfer& transfer, const LaunchShape& shape, Progress* progress,
                             cudaStream_t stream) {
    if (transfer.pages == 0) return cudaSuccess;
    const Pace pace{shape.picoseconds_per_kib};
    if (shape.method == CopyMethod::kVector) {
        const Tiling shares = plan_tiles(transfer.pages, transfer.segments_per_page, shape.blocks, 1);
        copy_pages_by_vector<<<shape.blocks, shape.warps * 32, 0, stream>>>(transfer, shares, pace, progress);
    } else {
        const Tiling tiles =
            plan_tiles(transfer.pages, transfer.segments_per_page, shape.blocks * shape.warps, shape.tiles_per_warp);
        const uint32_t shared_bytes = ring_bytes(shape.warps, shape.stages, shape.stage_bytes);
        const BulkShape ring{shape.stages, shape.stage_bytes, shape.timeout_ns};
        copy_pages_by_bulk<<<shape.blocks, shape.warps * 32, shared_bytes, stream>>>(transfer, tiles, ring, pace,
                                                                                     progress);
    }
    return cudaGetLastError();
}

cudaError_t launch_page_marks(const PageTransfer& transfer, bool zero, cudaStream_t stream) {
    if (transfer.pages == 0) return cudaSuccess;
    constexpr uint32_t kThreads = 256;
    mark_pages<<<(transfer.pages + kThreads - 1) / kThreads, kThreads, 0, stream>>>(transfer, zero);
    return cudaGetLastError();
}

}  // namespace specgen

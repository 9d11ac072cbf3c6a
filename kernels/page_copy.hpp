// What host code needs to launch a page copy: no CUDA syntax, no framework.
#pragma once

#include <cuda_runtime_api.h>

#include "page_geometry.hpp"

namespace specgen {

enum class CopyMethod : int32_t { kVector = 0, kBulk = 1 };

// `blocks` is the SM budget: one block fills one SM.
struct LaunchShape {
    CopyMethod method;
    uint32_t blocks;
    uint32_t warps;
    uint32_t stages;
    uint32_t stage_bytes;
    uint32_t tiles_per_warp;       // bulk: 1 for equal shares, more for warps that take tiles as they get on
    uint64_t picoseconds_per_kib;  // a warp's pace; 0: as fast as it goes
    uint64_t timeout_ns;
};

// Device words of one transfer in flight: zeroed before the first, left zeroed by each kernel.
struct Progress {
    uint32_t finished_blocks;
    uint32_t tiles_taken;
};

// Loads the kernels and raises their shared-memory limit on the current device: once, before the first launch or
// capture.
cudaError_t prepare_page_copy(uint32_t shared_bytes);

// Enqueues one kernel, whatever the number of pages; neither allocates nor waits, so a CUDA graph can capture it.
// No other transfer in flight uses `progress`.
cudaError_t launch_page_copy(const PageTransfer& transfer, const LaunchShape& shape, Progress* progress,
                             cudaStream_t stream);

// Enqueues the tags alone, for pages whose bytes a copy engine moves: with `zero` ahead of an export's bytes, without
// it after an export's or import's.
cudaError_t launch_page_marks(const PageTransfer& transfer, bool zero, cudaStream_t stream);

}  // namespace specgen

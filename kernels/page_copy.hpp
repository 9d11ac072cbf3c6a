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
    uint64_t timeout_ns;
};

// Loads the kernels and raises their shared-memory limit on the current device: once, before the first launch or capture.
cudaError_t prepare_page_copy(uint32_t shared_bytes);

// Enqueues one kernel, whatever the number of pages; neither allocates nor waits, so a CUDA graph can capture it.
// `finished_blocks` is a zeroed device word that no other transfer in flight uses; the kernel leaves it zeroed.
cudaError_t launch_page_copy(const PageTransfer& transfer, const LaunchShape& shape, uint32_t* finished_blocks, cudaStream_t stream);

}  // namespace specgen

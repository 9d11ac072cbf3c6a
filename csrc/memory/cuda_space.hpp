// The arena in GPU memory: cuMemCreate chunks, shared by POSIX descriptors, mapped for the borrowing device.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <vector>

#include "../utils/scoped_fd.hpp"

namespace specgen {

// Physical memory on the lender's device. Destroying it leaves the peers' mappings and descriptors alive.
class CudaChunk {
  public:
    CudaChunk(int device, uint64_t bytes);
    ~CudaChunk() { release(); }
    CudaChunk(const CudaChunk&) = delete;
    CudaChunk& operator=(const CudaChunk&) = delete;

    ScopedFd export_fd() const;
    void release() noexcept;

  private:
    CUmemGenericAllocationHandle handle_ = 0;
    bool owned_ = false;
};

class CudaSpace {
  public:
    // chunk_bytes must be a multiple of 2 MiB, the allocation granularity.
    CudaSpace(int device, uint32_t slots, uint64_t chunk_bytes);
    ~CudaSpace();
    CudaSpace(const CudaSpace&) = delete;
    CudaSpace& operator=(const CudaSpace&) = delete;

    void map(uint32_t slot, int fd);
    // The caller has drained every copy that touches the slot.
    void unmap(uint32_t slot);
    uint64_t base() const { return uint64_t(base_); }
    uint32_t mapped() const;
    int device() const { return device_; }

  private:
    void require_state(uint32_t slot, bool mapped) const;

    int device_;
    CUdeviceptr base_ = 0;
    uint64_t chunk_bytes_;
    std::vector<bool> mapped_;
};

}  // namespace specgen

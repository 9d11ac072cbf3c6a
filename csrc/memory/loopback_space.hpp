// The arena over shared memory: memfd chunks mapped side by side into one reserved address range.
#pragma once

#include <cstdint>
#include <vector>

#include "../utils/scoped_fd.hpp"

namespace specgen {

// A sealed memfd: whoever holds the descriptor can neither shrink nor grow it under the other side.
ScopedFd create_loopback_chunk(uint64_t bytes);

class LoopbackSpace {
  public:
    // Throws UsageError unless chunk_bytes is a positive multiple of the system's page size.
    LoopbackSpace(uint32_t slots, uint64_t chunk_bytes);
    ~LoopbackSpace();
    LoopbackSpace(const LoopbackSpace&) = delete;
    LoopbackSpace& operator=(const LoopbackSpace&) = delete;

    // Throws UsageError when the slot is taken or the descriptor is no sealed memfd of chunk_bytes. Keeps no
    // descriptor.
    void map(uint32_t slot, int fd);
    void unmap(uint32_t slot);
    uint64_t base() const { return uint64_t(base_); }
    uint32_t mapped() const;

  private:
    void require_state(uint32_t slot, bool mapped) const;

    uint8_t* base_;
    uint64_t chunk_bytes_;
    std::vector<bool> mapped_;
};

}  // namespace specgen

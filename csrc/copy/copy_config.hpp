// Which kernel moves a transfer, and in what shape. Pure: sizes in, a printable choice out.
#pragma once

#include <cstdint>
#include <string>

#include "../../kernels/page_geometry.hpp"

namespace specgen {

struct CopyConfig {
    std::string method;  // "vector" or "bulk"
    uint32_t sms;
    uint32_t warps;
    uint32_t stages;              // bulk: shared-memory stages a warp
    uint32_t stage_bytes;         // bulk
    uint32_t tiles_per_warp = 1;  // bulk: 1 for equal shares, more for warps that take tiles as they get on
    double max_gbps = 0;          // a pace for the whole transfer, in 1e9 bytes a second; 0: as fast as it goes

    std::string to_string() const;
    uint32_t shared_bytes() const { return method == "bulk" ? ring_bytes(warps, stages, stage_bytes) : 0; }
    uint64_t picoseconds_per_kib() const;  // a warp's share of the pace
};

constexpr uint32_t kSharedBytesPerBlock = 227 * 1024 - 2048;  // Hopper's limit less the kernel's own barriers

CopyConfig select_copy_config(uint32_t slot_bytes, uint64_t total_bytes, Direction direction, uint32_t sm_budget);

// Throws UsageError naming the field, its value and the limit.
void check_copy_config(const CopyConfig& config, uint32_t slot_bytes);

}  // namespace specgen

// Pages by 16-byte vectors: eight loads in flight a lane, no bytes kept in L1.
#pragma once

#include "pace.cuh"
#include "page_tags.cuh"

namespace specgen {

constexpr uint32_t kVectorBytes = 16;
constexpr uint32_t kVectorsInFlight = 8;

__device__ __forceinline__ uint4 load_streaming(uint64_t address) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_streaming(uint64_t address, const uint4& v) {
    asm volatile("st.relaxed.sys.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

struct Endpoints {
    uint64_t source;
    uint64_t target;
    uint32_t bytes;
};

__device__ __forceinline__ Endpoints endpoints_of(const PageTransfer& t, uint32_t segment_index) {
    const uint32_t page = segment_index / t.segments_per_page;
    const Segment segment = t.segments[segment_index - page * t.segments_per_page];
    const uint64_t device = segment.device_base + uint64_t(t.device_page(page)) * segment.device_stride;
    const uint64_t arena = t.arena.segment_address(segment, t.arena_page(page));
    return t.direction == Direction::kExport ? Endpoints{device, arena, segment.bytes}
                                             : Endpoints{arena, device, segment.bytes};
}

// A warp walks `kVectorsInFlight` rows of 32 vectors at a time through its block's share, seen as one run of slots.
__global__ void __launch_bounds__(1024, 1)
    copy_pages_by_vector(const PageTransfer t, const Tiling shares, const Pace pace, Progress* progress) {
    const Share share = shares.tile(blockIdx.x);
    if (t.direction == Direction::kExport) {
        if (!share.empty()) zero_tags(t, share, Crew::block());
        __threadfence_system();
    }
    __shared__ uint64_t start;
    if (threadIdx.x == 0) start = global_nanoseconds();
    __syncthreads();
    const uint32_t vectors_per_slot = (t.slot_bytes + kVectorBytes - 1) / kVectorBytes;
    const uint32_t total = (share.end - share.begin) * vectors_per_slot;
    const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr uint32_t kRow = 32, kStep = kRow * kVectorsInFlight;
    for (uint32_t step = warp * kStep; step < total; step += warps * kStep) {
        pace.hold(start, uint64_t(step / (warps * kStep)) * kStep * kVectorBytes);
        uint4 values[kVectorsInFlight];
        uint64_t targets[kVectorsInFlight];
#pragma unroll
        for (uint32_t k = 0; k < kVectorsInFlight; ++k) {
            const uint32_t vector = step + k * kRow + lane;
            targets[k] = 0;
            if (vector >= total) continue;
            const uint32_t slot = vector / vectors_per_slot;
            const uint32_t offset = (vector - slot * vectors_per_slot) * kVectorBytes;
            const Endpoints ends = endpoints_of(t, share.begin + slot);
            if (offset >= ends.bytes) continue;
            targets[k] = ends.target + offset;
            values[k] = load_streaming(ends.source + offset);
        }
#pragma unroll
        for (uint32_t k = 0; k < kVectorsInFlight; ++k) {
            if (targets[k] != 0) store_streaming(targets[k], values[k]);
        }
    }
    __threadfence_system();
    __syncthreads();
    if (!share.empty()) settle_tags(t, share, Crew::block());
    close_cut_pages(t, shares, false, progress);
}

}  // namespace specgen

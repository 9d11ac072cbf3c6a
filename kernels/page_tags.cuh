// Generation tags: zeroed before a page's first byte is overwritten, written after its last, checked after it was read.
#pragma once

#include <cuda_runtime.h>

#include "page_copy.hpp"

namespace specgen {

__device__ __forceinline__ void store_tag(const PageTransfer& t, uint32_t i, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(t.arena.tag_address(t.arena_page(i))), "l"(value)
                 : "memory");
}

__device__ __forceinline__ uint64_t load_tag(const PageTransfer& t, uint32_t i) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];"
                 : "=l"(value)
                 : "l"(t.arena.tag_address(t.arena_page(i)))
                 : "memory");
    return value;
}

// Threads that settle tags together: a warp or a block.
struct Crew {
    uint32_t member;
    uint32_t members;

    __device__ static Crew warp() { return {threadIdx.x % 32, 32}; }
    __device__ static Crew block() { return {threadIdx.x, blockDim.x}; }
};

// Zeroes the tags of all pages that a share touches. The crew must fence before it overwrites a byte of them.
__device__ __forceinline__ void zero_tags(const PageTransfer& t, const Share& share, const Crew& crew) {
    if (!t.tagged) return;
    const uint32_t last = share.last_page(t.segments_per_page);
    for (uint32_t i = share.first_page(t.segments_per_page) + crew.member; i <= last; i += crew.members)
        store_tag(t, i, 0);
}

__device__ __forceinline__ void settle_tag(const PageTransfer& t, uint32_t i) {
    if (t.direction == Direction::kExport) {
        store_tag(t, i, t.generations[i]);
    } else {
        t.flags[i] = load_tag(t, i) == t.generations[i] ? kPageMatches : kPageStale;
    }
}

constexpr uint32_t kTagsInFlight = 4;

// Reads tags across NVLink, so reads overlap.
__device__ __forceinline__ void check_tags(const PageTransfer& t, const Share& share, const Crew& crew, uint32_t first,
                                           uint32_t last) {
    uint64_t tags[kTagsInFlight];
#pragma unroll
    for (uint32_t k = 0; k < kTagsInFlight; ++k) {
        const uint32_t i = first + k * crew.members;
        if (i <= last && share.owns(i, t.segments_per_page)) tags[k] = load_tag(t, i);
    }
#pragma unroll
    for (uint32_t k = 0; k < kTagsInFlight; ++k) {
        const uint32_t i = first + k * crew.members;
        if (i <= last && share.owns(i, t.segments_per_page))
            t.flags[i] = tags[k] == t.generations[i] ? kPageMatches : kPageStale;
    }
}

// Settles the pages that a share moved whole, once the crew's accesses to them are complete and fenced.
__device__ __forceinline__ void settle_tags(const PageTransfer& t, const Share& share, const Crew& crew) {
    if (!t.tagged) return;
    const uint32_t first = share.first_page(t.segments_per_page) + crew.member,
                   last = share.last_page(t.segments_per_page);
    if (t.direction == Direction::kExport) {
        for (uint32_t i = first; i <= last; i += crew.members) {
            if (share.owns(i, t.segments_per_page)) store_tag(t, i, t.generations[i]);
        }
    } else {
        for (uint32_t i = first; i <= last; i += crew.members * kTagsInFlight) check_tags(t, share, crew, i, last);
    }
}

// Called by all threads of a block once their own data accesses are complete. Pages cut apart by tiles are settled by
// whichever block finishes last, which also resets `progress`. Without such pages and without tiles taken in turn there
// is nothing to wait for.
__device__ inline void close_cut_pages(const PageTransfer& t, const Tiling& tiling, bool taken_in_turn,
                                       Progress* progress) {
    __shared__ bool is_last;
    const bool any_cut = t.tagged && tiling.unit != t.segments_per_page;
    if (!any_cut && !taken_in_turn) return;
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&progress->finished_blocks, 1u) == gridDim.x - 1;
        __threadfence_system();
    }
    __syncthreads();
    if (!is_last) return;
    if (any_cut) {
        for (uint32_t index = threadIdx.x; index < tiling.tiles; index += blockDim.x) {
            const Share share = tiling.tile(index);
            if (!share.empty() && share.ends_cut_page(t.segments_per_page))
                settle_tag(t, share.first_page(t.segments_per_page));
        }
    }
    if (threadIdx.x == 0) *progress = {};
}

// For bytes that a copy engine moves: an export's tags before (`zero`) or after its bytes, an import's after them.
__global__ void __launch_bounds__(256) mark_pages(const PageTransfer t, const bool zero) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= t.pages) return;
    if (zero) {
        store_tag(t, i, 0);
    } else {
        settle_tag(t, i);
    }
}

}  // namespace specgen

// Generation tags: zeroed before a page's first byte is overwritten, written after its last, checked after it was read.
#pragma once

#include <cuda_runtime.h>

#include "page_geometry.hpp"

namespace specgen {

// A block's contiguous share of the segments of all pages, in page-major order.
struct Share {
    uint32_t begin;
    uint32_t end;

    __device__ static Share of_block(const PageTransfer& t, uint32_t block) {
        const uint64_t total = uint64_t(t.pages) * t.segments_per_page;
        return {uint32_t(total * block / gridDim.x), uint32_t(total * (block + 1) / gridDim.x)};
    }
    __device__ bool empty() const { return begin == end; }
    __device__ uint32_t first_page(uint32_t per_page) const { return begin / per_page; }
    __device__ uint32_t last_page(uint32_t per_page) const { return (end - 1) / per_page; }
    // Whether every segment of the page is this block's.
    __device__ bool owns(uint32_t page, uint32_t per_page) const {
        return page * per_page >= begin && (page + 1) * per_page <= end;
    }
};

__device__ __forceinline__ void store_tag(const PageTransfer& t, uint32_t i, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(t.arena.tag_address(t.arena_page(i))), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_tag(const PageTransfer& t, uint32_t i) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(t.arena.tag_address(t.arena_page(i))) : "memory");
    return value;
}

constexpr uint32_t kTagsInFlight = 4;

// Settles up to kTagsInFlight of the pages that the share owns: a tag's read crosses NVLink, so reads overlap.
__device__ __forceinline__ void settle_tags(const PageTransfer& t, const Share& share, uint32_t first, uint32_t last) {
    uint64_t tags[kTagsInFlight];
    const bool is_export = t.direction == Direction::kExport;
#pragma unroll
    for (uint32_t k = 0; k < kTagsInFlight; ++k) {
        const uint32_t i = first + k * blockDim.x;
        if (i > last || !share.owns(i, t.segments_per_page)) continue;
        if (is_export) {
            store_tag(t, i, t.generations[i]);
        } else {
            tags[k] = load_tag(t, i);
        }
    }
    if (is_export) return;
#pragma unroll
    for (uint32_t k = 0; k < kTagsInFlight; ++k) {
        const uint32_t i = first + k * blockDim.x;
        if (i <= last && share.owns(i, t.segments_per_page)) t.flags[i] = tags[k] == t.generations[i] ? kPageMatches : kPageStale;
    }
}

__device__ __forceinline__ void settle_tag(const PageTransfer& t, uint32_t i) {
    if (t.direction == Direction::kExport) {
        store_tag(t, i, t.generations[i]);
    } else {
        t.flags[i] = load_tag(t, i) == t.generations[i] ? kPageMatches : kPageStale;
    }
}

// Every block zeroes the tags of all pages it touches, so no byte of a page changes under a valid tag.
__device__ inline void open_tags(const PageTransfer& t, const Share& share) {
    if (t.direction == Direction::kExport && !share.empty()) {
        const uint32_t last = share.last_page(t.segments_per_page);
        for (uint32_t i = share.first_page(t.segments_per_page) + threadIdx.x; i <= last; i += blockDim.x) store_tag(t, i, 0);
        __threadfence_system();
    }
    __syncthreads();
}

// Called by all threads of a block once their own data accesses are complete. Whole pages are settled by the block that
// moved them; a page shared between blocks by whichever block finishes last, which also resets `finished_blocks`.
__device__ inline void close_tags(const PageTransfer& t, const Share& share, uint32_t* finished_blocks) {
    __shared__ bool is_last;
    __threadfence_system();
    __syncthreads();
    if (!share.empty()) {
        const uint32_t last = share.last_page(t.segments_per_page);
        for (uint32_t i = share.first_page(t.segments_per_page) + threadIdx.x; i <= last; i += blockDim.x * kTagsInFlight) {
            settle_tags(t, share, i, last);
        }
    }
    if (threadIdx.x == 0) {
        __threadfence_system();
        is_last = atomicAdd(finished_blocks, 1u) == gridDim.x - 1;
        __threadfence_system();
    }
    __syncthreads();
    if (!is_last) return;
    for (uint32_t block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
        const Share other = Share::of_block(t, block);
        if (other.empty()) continue;
        const uint32_t first = other.first_page(t.segments_per_page), last = other.last_page(t.segments_per_page);
        if (!other.owns(first, t.segments_per_page)) settle_tag(t, first);
        if (last != first && !other.owns(last, t.segments_per_page)) settle_tag(t, last);
    }
    if (threadIdx.x == 0) *finished_blocks = 0;
}

}  // namespace specgen

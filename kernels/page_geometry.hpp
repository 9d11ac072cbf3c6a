// Where a page's bytes are, on both sides of a transfer. Plain data, shared by host code, kernels and the loopback copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SPECGEN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPECGEN_HOST_DEVICE inline
#endif

namespace specgen {

enum class Direction : int32_t { kExport = 0, kImport = 1 };

// Flags the import leaves for each page.
enum PageFlag : int32_t { kPageUnchecked = 0, kPageMatches = 1, kPageStale = 2 };

// A page is cut into segments; segment s of device page d lies at device_base + d * device_stride, and of an arena page
// at the page's chunk + arena_offset + (page within the chunk) * arena_stride. All values are multiples of 16 bytes.
struct Segment {
    uint64_t device_base;
    uint64_t device_stride;
    uint64_t arena_offset;
    uint32_t arena_stride;
    uint32_t bytes;
};
static_assert(sizeof(Segment) == 32, "kernels read a segment as two 16-byte vectors");

// Arena pages are numbered through equal chunks mapped side by side from `base`; each chunk ends in its pages' tags.
struct ArenaView {
    uint64_t base;
    uint64_t chunk_bytes;
    uint64_t tag_offset;
    uint32_t pages_per_chunk;
    uint32_t reserved;

    SPECGEN_HOST_DEVICE uint64_t chunk_address(uint32_t page) const { return base + (page / pages_per_chunk) * chunk_bytes; }
    SPECGEN_HOST_DEVICE uint64_t segment_address(const Segment& segment, uint32_t page) const {
        return chunk_address(page) + segment.arena_offset + uint64_t(page % pages_per_chunk) * segment.arena_stride;
    }
    SPECGEN_HOST_DEVICE uint64_t tag_address(uint32_t page) const {
        return chunk_address(page) + tag_offset + uint64_t(page % pages_per_chunk) * sizeof(uint64_t);
    }
};

// Shared memory of a bulk copy's block: the stages, and beside each of a stage's 32 slots where its bytes go next.
constexpr uint32_t kSlotsPerStage = 32;
constexpr uint32_t kBookBytesPerStage = kSlotsPerStage * (sizeof(uint64_t) + sizeof(uint32_t));

constexpr uint32_t ring_bytes(uint32_t warps, uint32_t stages, uint32_t stage_bytes) {
    return warps * stages * (stage_bytes + kBookBytesPerStage);
}

// One transfer. Page tables hold one index for every `index_stride`-th entry, each divided by `index_stride`: 1 for page
// indices, the page size for SGLang's token indices.
struct PageTransfer {
    const Segment* segments;
    const int64_t* device_pages;
    const int64_t* arena_pages;
    const uint64_t* generations;
    int32_t* flags;
    ArenaView arena;
    uint32_t pages;
    uint32_t segments_per_page;
    uint32_t slot_bytes;  // the largest segment
    uint32_t index_stride;
    Direction direction;

    SPECGEN_HOST_DEVICE uint32_t device_page(uint32_t i) const {
        return uint32_t(device_pages[uint64_t(i) * index_stride]) / index_stride;
    }
    SPECGEN_HOST_DEVICE uint32_t arena_page(uint32_t i) const {
        return uint32_t(arena_pages[uint64_t(i) * index_stride]) / index_stride;
    }
};

}  // namespace specgen

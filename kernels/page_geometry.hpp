// Where a page's bytes are, on both sides of a transfer. Plain data, shared by host code, kernels and the loopback
// copy.
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

    SPECGEN_HOST_DEVICE uint64_t chunk_address(uint32_t page) const {
        return base + (page / pages_per_chunk) * chunk_bytes;
    }
    SPECGEN_HOST_DEVICE uint64_t segment_address(const Segment& segment, uint32_t page) const {
        return chunk_address(page) + segment.arena_offset + uint64_t(page % pages_per_chunk) * segment.arena_stride;
    }
    SPECGEN_HOST_DEVICE uint64_t tag_address(uint32_t page) const {
        return chunk_address(page) + tag_offset + uint64_t(page % pages_per_chunk) * sizeof(uint64_t);
    }
};

// Shared memory of a bulk copy's block: the stages, and beside each of a stage's 32 slots where its bytes go next.
constexpr uint32_t kSlotsPerStage = 32;
constexpr uint32_t kMaxStagesPerBlock = 128;  // of all warps together
constexpr uint32_t kBookBytesPerStage = kSlotsPerStage * (sizeof(uint64_t) + sizeof(uint32_t));

constexpr uint32_t ring_bytes(uint32_t warps, uint32_t stages, uint32_t stage_bytes) {
    return warps * stages * (stage_bytes + kBookBytesPerStage);
}

// Contiguous, page-major segments, and which pages they complete.
struct Share {
    uint32_t begin;
    uint32_t end;

    SPECGEN_HOST_DEVICE bool empty() const { return begin >= end; }
    SPECGEN_HOST_DEVICE uint32_t first_page(uint32_t per_page) const { return begin / per_page; }
    SPECGEN_HOST_DEVICE uint32_t last_page(uint32_t per_page) const { return (end - 1) / per_page; }
    // Whether every segment of the page lies in this share.
    SPECGEN_HOST_DEVICE bool owns(uint32_t page, uint32_t per_page) const {
        return page * per_page >= begin && (page + 1) * per_page <= end;
    }
    // Whether the share holds the end of its first page, but not its start: of a page cut apart, one share says so.
    SPECGEN_HOST_DEVICE bool ends_cut_page(uint32_t per_page) const {
        return begin % per_page != 0 && end >= (first_page(per_page) + 1) * per_page;
    }
};

// All segments of a transfer cut into tiles for warps to take: coarse ones first, then fine ones that even out the end.
// NVLink serves SMs unequally when they offer more than it carries: with equal shares, 16 SMs were idle for 21 % of a
// push (H100, ncu), because the last one decides.
struct Tiling {
    uint32_t unit;  // tiles begin and end at multiples of so many segments: a page's, or 1
    uint32_t units;
    uint32_t tiles;
    uint32_t coarse_tiles;
    uint32_t coarse_units;

    SPECGEN_HOST_DEVICE Share tile(uint32_t index) const {
        return {boundary(index) * unit, boundary(index + 1) * unit};
    }
    SPECGEN_HOST_DEVICE uint32_t boundary(uint32_t index) const {
        if (index <= coarse_tiles) return uint32_t(uint64_t(coarse_units) * index / coarse_tiles);
        return coarse_units +
               uint32_t(uint64_t(units - coarse_units) * (index - coarse_tiles) / (tiles - coarse_tiles));
    }
};

// `workers` warps (or blocks) with `per_worker` tiles each; 1: equal shares, decided beforehand. Tiles hold whole pages
// where that leaves every worker several, so that few tags wait for the last block.
SPECGEN_HOST_DEVICE Tiling plan_tiles(uint32_t pages, uint32_t segments_per_page, uint32_t workers,
                                      uint32_t per_worker) {
    const uint32_t enough = per_worker == 1 ? 32 : 4 * per_worker;  // shares that are whole pages must still be even
    const bool whole = (per_worker == 1 && pages % workers == 0) || pages / workers >= enough;
    Tiling plan{whole ? segments_per_page : 1, whole ? pages : pages * segments_per_page, workers * per_worker, 0, 0};
    plan.coarse_tiles = per_worker == 1 ? workers : workers * (per_worker / 2);
    plan.coarse_units = per_worker == 1 ? plan.units : uint32_t(uint64_t(plan.units) * 7 / 8);
    return plan;
}

// One transfer. Page tables hold one index for every `index_stride`-th entry, each divided by `index_stride`: 1 for
// page indices, the page size for SGLang's token indices.
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
    bool tagged = true;  // false: tags are neither zeroed, written nor checked

    SPECGEN_HOST_DEVICE uint32_t device_page(uint32_t i) const {
        return uint32_t(device_pages[uint64_t(i) * index_stride]) / index_stride;
    }
    SPECGEN_HOST_DEVICE uint32_t arena_page(uint32_t i) const {
        return uint32_t(arena_pages[uint64_t(i) * index_stride]) / index_stride;
    }
};

}  // namespace specgen

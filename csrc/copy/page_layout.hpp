// Cuts a page into segments and places it in an arena chunk.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../kernels/page_geometry.hpp"

namespace specgen {

// One device buffer with a row per page: a layer's K, its V, MLA's latent, or a DSA index. `bytes` of each row travel.
struct Plane {
    uint64_t base;
    uint64_t stride;
    uint64_t bytes;
};

enum class ArenaLayout { kLayerFirst, kPageFirst };

struct PageLayout {
    ArenaLayout layout;
    uint64_t chunk_bytes;
    uint64_t page_bytes;
    uint32_t pages_per_chunk;
    uint64_t tag_offset;
    uint32_t slot_bytes;
    std::vector<Segment> segments;
    std::vector<uint32_t> plane_ends;  // the segment after each plane's last

    // The segments before they were cut to size: one a plane, or fewer where planes lie side by side on both sides.
    std::vector<Segment> rows() const;
    ArenaView view(uint64_t base) const { return {base, chunk_bytes, tag_offset, pages_per_chunk, 0}; }
};

// Pages that fit a chunk beside their 8-byte tags.
uint32_t pages_in_chunk(uint64_t chunk_bytes, uint64_t page_bytes);

// Throws UsageError naming the plane and value: sizes, strides and addresses must be multiples of 16 bytes.
PageLayout plan_page_layout(const std::vector<Plane>& planes, ArenaLayout layout, uint64_t chunk_bytes,
                            uint32_t max_segment_bytes);

// Some of a page's planes, where they lie in the whole page: for copies layer by layer. Throws UsageError.
PageLayout select_planes(const PageLayout& layout, uint32_t first, uint32_t count);

}  // namespace specgen

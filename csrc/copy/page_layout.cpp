#include "page_layout.hpp"

#include <algorithm>

#include "../utils/error.hpp"

namespace specgen {
namespace {

constexpr uint64_t kAlignment = 16;
constexpr uint64_t kPieceAlignment = 128;  // one L2 line: pieces of one row never share a line

void check_plane(size_t index, const Plane& plane) {
    const auto require = [&](bool ok, const char* field, uint64_t value) {
        if (!ok)
            throw UsageError(
                concat("plane ", index, ": ", field, "=", value, " must be a positive multiple of 16 bytes"));
    };
    require(plane.base != 0 && plane.base % kAlignment == 0, "base", plane.base);
    require(plane.bytes != 0 && plane.bytes % kAlignment == 0, "bytes", plane.bytes);
    require(plane.stride % kAlignment == 0 && plane.stride >= plane.bytes, "stride", plane.stride);
}

}  // namespace

uint32_t pages_in_chunk(uint64_t chunk_bytes, uint64_t page_bytes) {
    if (page_bytes == 0) throw UsageError("page_bytes=0: a page must have bytes");
    return uint32_t(chunk_bytes / (page_bytes + sizeof(uint64_t)));
}

PageLayout plan_page_layout(const std::vector<Plane>& planes, ArenaLayout layout, uint64_t chunk_bytes,
                            uint32_t max_segment_bytes) {
    if (planes.empty()) throw UsageError("planes is empty: a page needs at least one buffer");
    if (max_segment_bytes < kPieceAlignment || max_segment_bytes % kPieceAlignment != 0) {
        throw UsageError(
            concat("max_segment_bytes=", max_segment_bytes, " must be a positive multiple of ", kPieceAlignment));
    }
    PageLayout plan{layout, chunk_bytes, 0, 0, 0, 0, {}, {}};
    for (size_t i = 0; i < planes.size(); ++i) {
        check_plane(i, planes[i]);
        plan.page_bytes += planes[i].bytes;
    }
    plan.pages_per_chunk = pages_in_chunk(chunk_bytes, plan.page_bytes);
    if (plan.pages_per_chunk == 0)
        throw UsageError(
            concat("chunk_bytes=", chunk_bytes, " holds no page of ", plan.page_bytes, " bytes: use larger chunks"));
    plan.tag_offset = plan.pages_per_chunk * plan.page_bytes;
    uint64_t before = 0;
    for (const Plane& plane : planes) {
        const bool page_first = layout == ArenaLayout::kPageFirst;
        const uint64_t offset = page_first ? before : before * plan.pages_per_chunk;
        const uint64_t stride = page_first ? plan.page_bytes : plane.bytes;
        if (stride > UINT32_MAX)
            throw UsageError(concat("a page of ", stride, " bytes is too large: the limit is 4 GiB"));
        const uint64_t pieces = (plane.bytes + max_segment_bytes - 1) / max_segment_bytes;
        const uint64_t even =
            ((plane.bytes + pieces - 1) / pieces + kPieceAlignment - 1) / kPieceAlignment * kPieceAlignment;
        for (uint64_t at = 0; at < plane.bytes; at += even) {
            const uint32_t bytes = uint32_t(std::min(even, plane.bytes - at));
            plan.segments.push_back({plane.base + at, plane.stride, offset + at, uint32_t(stride), bytes});
            plan.slot_bytes = std::max(plan.slot_bytes, bytes);
        }
        before += plane.bytes;
        plan.plane_ends.push_back(uint32_t(plan.segments.size()));
    }
    return plan;
}

PageLayout select_planes(const PageLayout& layout, uint32_t first, uint32_t count) {
    const size_t planes = layout.plane_ends.size();
    if (count == 0 || first >= planes || count > planes - first) {
        throw UsageError(concat("planes ", first, " to ", uint64_t(first) + count, ": the page has ", planes));
    }
    PageLayout part = layout;
    const auto begin = layout.segments.begin();
    part.segments.assign(begin + (first == 0 ? 0 : layout.plane_ends[first - 1]),
                         begin + layout.plane_ends[first + count - 1]);
    part.plane_ends.clear();
    part.page_bytes = part.slot_bytes = 0;
    for (const Segment& segment : part.segments) {
        part.page_bytes += segment.bytes;
        part.slot_bytes = std::max(part.slot_bytes, segment.bytes);
    }
    return part;
}

std::vector<Segment> PageLayout::rows() const {
    std::vector<Segment> joined;
    for (const Segment& segment : segments) {
        const bool continues = !joined.empty() && joined.back().device_stride == segment.device_stride &&
                               joined.back().arena_stride == segment.arena_stride &&
                               joined.back().device_base + joined.back().bytes == segment.device_base &&
                               joined.back().arena_offset + joined.back().bytes == segment.arena_offset;
        if (continues) {
            joined.back().bytes += segment.bytes;
        } else {
            joined.push_back(segment);
        }
    }
    return joined;
}

}  // namespace specgen

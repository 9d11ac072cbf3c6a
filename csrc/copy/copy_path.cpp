#include "copy_path.hpp"

#include <algorithm>

namespace specgen {
namespace {

// An entry of a batch costs the host 1.3 us (H100's host), in which the copy engine carries some 500 KB.
constexpr uint64_t kBytesPerRun = 1 << 20;
constexpr uint64_t kLeastStagedBytes = 64ull << 20;
constexpr uint32_t kNowhere = 0xffffffffu;

struct Stretch {
    uint32_t page;  // the first, less the least page of the list
    uint32_t pages;
};

std::vector<Stretch> stretches_of(const std::vector<uint32_t>& position_of, int64_t least, uint32_t pages_per_chunk,
                                  uint32_t piece_pages) {
    std::vector<Stretch> found;
    for (uint32_t page = 0; page < position_of.size(); ++page) {
        if (position_of[page] == kNowhere) continue;
        const bool joins = !found.empty() && found.back().page + found.back().pages == page &&
                           (least + page) % pages_per_chunk != 0 && found.back().pages < piece_pages;
        if (joins) {
            ++found.back().pages;
        } else {
            found.push_back({page, 1});
        }
    }
    return found;
}

}  // namespace

StagingPlan plan_staging(const std::vector<int64_t>& arena_pages, uint32_t pages_per_chunk, uint32_t piece_pages,
                         uint32_t most_runs) {
    StagingPlan plan;
    if (arena_pages.empty()) return plan;
    const auto [least, most] = std::minmax_element(arena_pages.begin(), arena_pages.end());
    std::vector<uint32_t> position_of(size_t(*most - *least) + 1, kNowhere);
    for (uint32_t i = 0; i < arena_pages.size(); ++i) {
        uint32_t& position = position_of[size_t(arena_pages[i] - *least)];
        if (position == kNowhere) position = i;
    }
    std::vector<Stretch> stretches = stretches_of(position_of, *least, pages_per_chunk, piece_pages);
    if (stretches.size() > most_runs) {
        std::nth_element(stretches.begin(), stretches.begin() + most_runs, stretches.end(),
                         [](const Stretch& a, const Stretch& b) { return a.pages > b.pages; });
        stretches.resize(most_runs);
    }
    std::vector<bool> is_packed(arena_pages.size(), false);
    plan.order.reserve(arena_pages.size());
    for (const Stretch& stretch : stretches) {
        for (uint32_t i = 0; i < stretch.pages; ++i) {
            if (i == 0 || plan.packed % piece_pages == 0) plan.runs.push_back({plan.packed, 0});
            const uint32_t position = position_of[stretch.page + i];
            plan.order.push_back(position);
            is_packed[position] = true;
            ++plan.runs.back().pages;
            ++plan.packed;
        }
    }
    for (uint32_t i = 0; i < arena_pages.size(); ++i) {
        if (!is_packed[i]) plan.order.push_back(i);
    }
    return plan;
}

uint32_t most_runs_for(uint64_t total_bytes) {
    return uint32_t(std::max<uint64_t>(1, total_bytes / kBytesPerRun));
}

CopyPath select_copy_path(uint64_t total_bytes, bool pieces_fit, bool paced) {
    return pieces_fit && !paced && total_bytes >= kLeastStagedBytes ? CopyPath::kStaged : CopyPath::kDirect;
}

}  // namespace specgen

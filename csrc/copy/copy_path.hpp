// How a transfer's bytes travel: by SMs alone, by the copy engine alone, or packed by SMs and carried by the copy
// engine. Pure: page tables in, a plan out.
#pragma once

#include <cstdint>
#include <vector>

#include "page_layout.hpp"

namespace specgen {

enum class CopyPath : int32_t {
    kAuto,
    kDirect,  // one kernel, pool to arena
    kEngine,  // one batch for the copy engine, a row an entry
    kStaged,  // SMs pack pages into local memory, the copy engine carries whole runs of them
};

// Arena pages side by side in one chunk, at positions first, first + 1, ... of a plan's order.
struct Run {
    uint32_t first;
    uint32_t pages;
};

struct StagingPlan {
    std::vector<uint32_t> order;  // positions in the caller's list: those to be packed, run by run, then the others
    std::vector<Run> runs;        // of the packed ones; none crosses a piece of `piece_pages`
    uint32_t packed = 0;
};

// Packs the longest runs, at most `most_runs` of them: each costs the host an entry in a batch. What is left over goes
// directly, as do repeated pages.
StagingPlan plan_staging(const std::vector<int64_t>& arena_pages, uint32_t pages_per_chunk, uint32_t piece_pages,
                         uint32_t most_runs);

// Entries that enqueueing may take, so that the copy engine doesn't wait for the host.
uint32_t most_runs_for(uint64_t total_bytes);

// What kAuto stands for; `pieces_fit`: pages can be packed at all (page-first, and small enough for the staging
// memory).
CopyPath select_copy_path(uint64_t total_bytes, bool pieces_fit, bool paced);

}  // namespace specgen

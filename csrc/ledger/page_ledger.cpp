#include "page_ledger.hpp"

#include <unordered_set>

#include "../utils/error.hpp"

namespace specgen {

PageLedger::PageLedger(uint32_t slots, uint32_t pages_per_chunk) : pages_per_chunk_(pages_per_chunk), chunks_(slots) {
    if (slots == 0 || pages_per_chunk == 0)
        throw UsageError(concat("slots=", slots, ", pages_per_chunk=", pages_per_chunk, ": both must be positive"));
}

PageLedger::Chunk& PageLedger::chunk_of(int64_t page) {
    const size_t slot = size_t(page) / pages_per_chunk_;
    if (page < 0 || slot >= chunks_.size())
        throw UsageError(
            concat("page ", page, " lies outside the arena of ", chunks_.size() * pages_per_chunk_, " pages"));
    return chunks_[slot];
}

void PageLedger::require_same_length(const std::vector<int64_t>& pages,
                                     const std::vector<uint64_t>& generations) const {
    if (pages.size() != generations.size())
        throw UsageError(concat(pages.size(), " pages but ", generations.size(), " generations"));
}

bool PageLedger::is_current(int64_t page, uint64_t generation) const {
    const Chunk& chunk = chunk_of(page);
    return chunk.state == ChunkState::kMapped && generation != 0 &&
           chunk.pages[size_t(page) % pages_per_chunk_].generation == generation;
}

void PageLedger::add_chunk(uint32_t slot) {
    Chunk& chunk = chunks_.at(slot);
    if (chunk.state != ChunkState::kEmpty) throw UsageError(concat("slot ", slot, " already holds a chunk"));
    chunk.state = ChunkState::kMapped;
    chunk.paused = false;
    chunk.copies = 0;
    chunk.pages.assign(pages_per_chunk_, Page{});
    chunk.free.resize(pages_per_chunk_);
    for (uint32_t i = 0; i < pages_per_chunk_; ++i) chunk.free[i] = pages_per_chunk_ - 1 - i;
    counts_.free += pages_per_chunk_;
    counts_.total += pages_per_chunk_;
}

uint32_t PageLedger::revoke_chunk(uint32_t slot) {
    Chunk& chunk = chunks_.at(slot);
    if (chunk.state != ChunkState::kMapped)
        throw UsageError(concat("slot ", slot, " holds no chunk that could be revoked"));
    uint32_t lost = 0;
    for (Page& page : chunk.pages) {
        if (page.generation == 0) continue;
        (page.copies > 0 ? counts_.in_flight : counts_.used) -= 1;
        page.generation = 0;
        ++lost;
    }
    counts_.free -= int64_t(chunk.free.size());
    counts_.revoking += pages_per_chunk_;
    chunk.free.clear();
    chunk.state = ChunkState::kRevoking;
    return lost;
}

void PageLedger::remove_chunk(uint32_t slot) {
    Chunk& chunk = chunks_.at(slot);
    if (chunk.state != ChunkState::kRevoking) throw UsageError(concat("slot ", slot, " is not being revoked"));
    if (chunk.copies > 0)
        throw UsageError(
            concat("slot ", slot, " still has ", chunk.copies, " page copies in flight: drain them first"));
    counts_.revoking -= pages_per_chunk_;
    counts_.total -= pages_per_chunk_;
    chunk = Chunk{};
}

uint32_t PageLedger::copies_in(uint32_t slot) const {
    return chunks_.at(slot).copies;
}

std::vector<int64_t> PageLedger::allocate(uint32_t count) {
    std::vector<int64_t> pages;
    size_t available = 0;
    for (const Chunk& chunk : chunks_) available += chunk.paused ? 0 : chunk.free.size();
    if (available < count) return pages;
    pages.reserve(count);
    for (size_t slot = 0; slot < chunks_.size() && pages.size() < count; ++slot) {
        Chunk& chunk = chunks_[slot];
        while (!chunk.paused && !chunk.free.empty() && pages.size() < count) {
            const uint32_t page = chunk.free.back();
            chunk.free.pop_back();
            chunk.pages[page].generation = next_generation_++;
            pages.push_back(int64_t(slot) * pages_per_chunk_ + page);
        }
    }
    counts_.free -= count;
    counts_.used += count;
    return pages;
}

uint64_t PageLedger::generation(int64_t page) const {
    return const_cast<PageLedger*>(this)->chunk_of(page).pages.at(size_t(page) % pages_per_chunk_).generation;
}

uint32_t PageLedger::release(const std::vector<int64_t>& pages, const std::vector<uint64_t>& generations) {
    require_same_length(pages, generations);
    std::unordered_set<int64_t> seen;
    for (size_t i = 0; i < pages.size(); ++i) {
        if (!seen.insert(pages[i]).second) throw UsageError(concat("page ", pages[i], " is listed twice"));
        if (is_current(pages[i], generations[i]) && page_of(pages[i]).copies > 0) {
            throw UsageError(concat("page ", pages[i], " has a copy in flight: wait for it before releasing the page"));
        }
    }
    uint32_t freed = 0;
    for (size_t i = 0; i < pages.size(); ++i) {
        if (!is_current(pages[i], generations[i])) continue;
        page_of(pages[i]).generation = 0;
        chunk_of(pages[i]).free.push_back(uint32_t(size_t(pages[i]) % pages_per_chunk_));
        ++freed;
    }
    counts_.used -= freed;
    counts_.free += freed;
    return freed;
}

std::vector<uint32_t> PageLedger::begin_copy(const std::vector<int64_t>& pages,
                                             const std::vector<uint64_t>& generations) {
    require_same_length(pages, generations);
    std::vector<uint32_t> stale;
    for (size_t i = 0; i < pages.size(); ++i) {
        if (!is_current(pages[i], generations[i])) stale.push_back(uint32_t(i));
    }
    if (!stale.empty()) return stale;
    for (int64_t index : pages) {
        Page& page = page_of(index);
        if (page.copies++ == 0) counts_.used -= 1, counts_.in_flight += 1;
        chunk_of(index).copies += 1;
    }
    return stale;
}

void PageLedger::end_copy(const std::vector<int64_t>& pages) {
    for (int64_t index : pages) {
        Chunk& chunk = chunk_of(index);
        if (chunk.state == ChunkState::kEmpty || page_of(index).copies == 0)
            throw UsageError(concat("page ", index, " has no copy in flight"));
        Page& page = page_of(index);
        chunk.copies -= 1;
        if (--page.copies == 0 && chunk.state == ChunkState::kMapped) counts_.in_flight -= 1, counts_.used += 1;
    }
}

PageCounts PageLedger::counts() const {
    return counts_;
}

void PageLedger::check_integrity() const {
    PageCounts found{};
    for (const Chunk& chunk : chunks_) {
        if (chunk.state == ChunkState::kEmpty) continue;
        found.total += pages_per_chunk_;
        uint64_t copies = 0;
        int64_t free = 0;
        for (const Page& page : chunk.pages) {
            copies += page.copies;
            if (chunk.state == ChunkState::kRevoking)
                found.revoking += 1;
            else if (page.generation == 0)
                free += 1;
            else
                (page.copies > 0 ? found.in_flight : found.used) += 1;
        }
        found.free += free;
        if (copies != chunk.copies)
            throw UsageError(concat("a chunk counts ", chunk.copies, " page copies, its pages ", copies));
        if (chunk.state == ChunkState::kMapped && int64_t(chunk.free.size()) != free) {
            throw UsageError(concat("a chunk lists ", chunk.free.size(), " free pages, its pages say ", free));
        }
    }
    const auto text = [](const PageCounts& c) {
        return concat("free ", c.free, " + used ", c.used, " + in flight ", c.in_flight, " + revoking ", c.revoking,
                      " of ", c.total);
    };
    const bool same = found.free == counts_.free && found.used == counts_.used &&
                      found.in_flight == counts_.in_flight && found.revoking == counts_.revoking &&
                      found.total == counts_.total;
    if (!same || counts_.free + counts_.used + counts_.in_flight + counts_.revoking != counts_.total) {
        throw UsageError(concat("ledger says ", text(counts_), "; its pages say ", text(found)));
    }
}

}  // namespace specgen

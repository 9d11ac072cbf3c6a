// Which arena pages are free, used, in flight or being revoked. No locks, no memory behind it: bookkeeping only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace specgen {

struct PageCounts {
    int64_t free, used, in_flight, revoking, total;
};

class PageLedger {
  public:
    PageLedger(uint32_t slots, uint32_t pages_per_chunk);

    void add_chunk(uint32_t slot);
    // Pages of a revoked chunk are lost at once: their generations no longer match. Returns how many were in use.
    uint32_t revoke_chunk(uint32_t slot);
    // Throws UsageError unless the chunk is being revoked and no copy uses it.
    void remove_chunk(uint32_t slot);
    uint32_t copies_in(uint32_t slot) const;
    bool is_mapped(uint32_t slot) const { return chunks_.at(slot).state != ChunkState::kEmpty; }
    // A paused chunk gives out no pages.
    void pause_chunk(uint32_t slot, bool paused) { chunks_.at(slot).paused = paused; }

    // Empty when fewer than `count` pages are free. Fills lower slots first, so that higher ones can be given back.
    std::vector<int64_t> allocate(uint32_t count);
    uint64_t generation(int64_t page) const;
    // Pages whose generation has passed are skipped: their chunk was revoked. Returns how many were freed.
    // Throws UsageError, having freed nothing, when a page is still being copied or is listed twice.
    uint32_t release(const std::vector<int64_t>& pages, const std::vector<uint64_t>& generations);

    // Marks all pages in flight, or none; returns the positions of those that are stale.
    std::vector<uint32_t> begin_copy(const std::vector<int64_t>& pages, const std::vector<uint64_t>& generations);
    void end_copy(const std::vector<int64_t>& pages);

    PageCounts counts() const;
    // Recounts every page and compares with the running counts; throws UsageError naming both.
    void check_integrity() const;

  private:
    enum class ChunkState : uint8_t { kEmpty, kMapped, kRevoking };
    struct Page {
        uint64_t generation = 0;  // 0: free
        uint32_t copies = 0;
    };
    struct Chunk {
        ChunkState state = ChunkState::kEmpty;
        bool paused = false;
        uint32_t copies = 0;
        std::vector<Page> pages;
        std::vector<uint32_t> free;
    };

    Chunk& chunk_of(int64_t page);
    const Chunk& chunk_of(int64_t page) const { return const_cast<PageLedger*>(this)->chunk_of(page); }
    Page& page_of(int64_t page) { return chunk_of(page).pages.at(std::size_t(page) % pages_per_chunk_); }
    bool is_current(int64_t page, uint64_t generation) const;
    void require_same_length(const std::vector<int64_t>& pages, const std::vector<uint64_t>& generations) const;

    uint32_t pages_per_chunk_;
    uint64_t next_generation_ = 1;
    PageCounts counts_{};
    std::vector<Chunk> chunks_;
};

}  // namespace specgen

// The copy engine's part of transfers: local memory in pieces that SMs fill and the copy engine empties, or the other
// way round. The engine's packets on NVLink carry 256 bytes behind one header, those of SMs 128.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <vector>

#include "../../kernels/page_copy.hpp"
#include "copy_path.hpp"

namespace specgen {

// Addresses and sizes of one cudaMemcpyBatchAsync; the stream may not be the legacy default one.
struct EngineBatch {
    std::vector<uint64_t> targets;
    std::vector<uint64_t> sources;
    std::vector<uint64_t> sizes;

    void add(uint64_t target, uint64_t source, uint64_t bytes);
    void enqueue(cudaStream_t stream);  // and forgets the entries
};
void enqueue_engine_batch(const uint64_t* targets, const uint64_t* sources, const uint64_t* sizes, size_t count,
                          cudaStream_t stream);

class StagingRing {
  public:
    // `bytes` are divided into kPieces; throws UsageError when a piece would hold no page. On the current device.
    // `engines` streams take the pieces in turn: while one waits for its next piece, another's is on the link.
    StagingRing(const PageLayout& layout, uint64_t bytes, uint32_t engines);
    ~StagingRing();
    StagingRing(const StagingRing&) = delete;
    StagingRing& operator=(const StagingRing&) = delete;

    static bool fits(const PageLayout& layout, uint64_t bytes);
    uint32_t piece_pages() const { return piece_pages_; }

    // Moves the bytes, not the tags, of a plan's packed pages. `transfer` has its tables in the plan's order,
    // `arena_pages` says the same on the host. `stream` has waited for the copy engine when the next work on it starts.
    void carry(const PageTransfer& transfer, const StagingPlan& plan, const std::vector<int64_t>& arena_pages,
               const LaunchShape& shape, Progress* progress, cudaStream_t stream);

  private:
    static constexpr uint32_t kPieces = 4;
    struct Piece {
        cudaEvent_t by_sms = nullptr;
        cudaEvent_t by_engine = nullptr;
    };
    PageTransfer local(const PageTransfer& transfer, uint32_t first, uint32_t pages) const;
    void add_runs(const PageTransfer& transfer, const StagingPlan& plan, const std::vector<int64_t>& arena_pages,
                  uint32_t first, uint32_t& run);

    uint64_t page_bytes_;
    uint32_t piece_pages_;
    uint8_t* memory_ = nullptr;
    int64_t* slots_ = nullptr;  // 0, 1, 2, ...: the pages of `memory_` as a page table
    struct Engine {
        cudaStream_t stream = nullptr;
        cudaEvent_t order = nullptr;
    };
    std::vector<Engine> engines_;
    std::array<Piece, kPieces> pieces_{};
    EngineBatch batch_;
};

}  // namespace specgen

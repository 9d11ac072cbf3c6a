// The page copy on a GPU: a stream of its own, ordered against the caller's stream by events. Not thread-safe: the GIL
// guards it.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <vector>

#include "../../kernels/page_copy.hpp"
#include "copy_config.hpp"
#include "loopback_copier.hpp"
#include "staging_ring.hpp"

namespace specgen {

// Device addresses of a prepared transfer: int64 page tables, uint64 generations, int32 flags (0 for an export).
struct DeviceTables {
    uint64_t device_pages;
    uint64_t arena_pages;
    uint64_t generations;
    uint64_t flags;
    uint32_t pages;
    uint32_t index_stride;
};

struct CopierOptions {
    uint32_t sm_budget = 16;
    double max_gbps = 0;
    uint32_t timeout_ms = 10000;
    uint32_t staging_engines = 2;  // streams that carry the pieces
    uint64_t staging_bytes = 0;    // local memory for CopyPath::kStaged, where pages fit it; 0: never staged
};

class CudaCopier {
  public:
    CudaCopier(PageLayout layout, uint64_t arena_base, int device, const CopierOptions& options);
    ~CudaCopier();
    CudaCopier(const CudaCopier&) = delete;
    CudaCopier& operator=(const CudaCopier&) = delete;

    // Starts after the work now on `after_stream` (0: the legacy default stream), on this copier's stream. Throws
    // UsageError when pages can't be staged and kStaged is asked for.
    uint64_t submit(Direction direction, const PageList& pages, uint64_t after_stream, CopyPath path);
    // What kAuto stands for with so many pages.
    CopyPath path_for(uint32_t pages) const;
    bool done(uint64_t ticket);
    std::vector<int32_t> take_flags(uint64_t ticket);
    // Makes `stream` wait for the ticket, without the host waiting.
    void order_after(uint64_t ticket, uint64_t stream);

    // One kernel on `stream`, which a CUDA graph may be capturing: no allocation, no wait. Transfers in flight at the
    // same time need different `lane`s (0 to 15; 0 is submit's).
    void launch(Direction direction, const DeviceTables& tables, const CopyConfig& config, uint64_t stream,
                uint32_t lane);
    CopyConfig select(Direction direction, uint32_t pages) const;
    const PageLayout& layout() const { return layout_; }
    uint64_t stream() const { return uint64_t(stream_); }

  private:
    struct Staging;
    struct Ticket {
        std::unique_ptr<Staging> staging;
        uint32_t pages;
        Direction direction;
        std::vector<uint32_t> order;  // where the pages' flags belong; empty: in the caller's order
    };
    std::unique_ptr<Staging> staging_for(uint32_t pages);
    PageTransfer transfer_of(Direction direction, const DeviceTables& tables) const;
    void check_addressable(uint32_t pages) const;
    LaunchShape shape_of(const CopyConfig& config) const;
    void copy_by_engine(const PageTransfer& transfer, const PageList& pages);
    void copy_staged(const PageTransfer& transfer, const PageList& pages, const StagingPlan& plan);
    void launch_rest(const PageTransfer& transfer, uint32_t first, uint32_t sms);
    Ticket& ticket_of(uint64_t ticket);

    PageLayout layout_;
    uint64_t arena_base_;
    int device_;
    CopierOptions options_;
    cudaStream_t stream_ = nullptr;
    cudaStream_t rest_ = nullptr;  // for pages that go directly while others are packed on `stream_`
    cudaEvent_t order_ = nullptr;
    cudaEvent_t rest_order_ = nullptr;
    Segment* segments_ = nullptr;
    Progress* progress_ = nullptr;
    uint64_t submitted_ = 0;
    std::map<uint64_t, Ticket> tickets_;
    std::vector<std::unique_ptr<Staging>> idle_;
    std::unique_ptr<StagingRing> ring_;  // null: pages can't be staged
};

}  // namespace specgen

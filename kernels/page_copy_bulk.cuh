// Pages by TMA bulk copies: each warp of a block runs a ring of shared-memory stages of its own, so no warp waits for
// another. A stage holds up to 32 segments; lane i moves segment i in (mbarrier) and out (bulk group).
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

#include "page_copy_vector.cuh"

namespace specgen {

// Stores of this many stages may still be reading shared memory while newer loads are issued.
constexpr uint32_t kStagesDraining = 2;
constexpr uint32_t kMaxWarps = 8;
constexpr uint32_t kMaxStages = 16;

struct BulkShape {
    uint32_t stages;
    uint32_t stage_bytes;
    uint64_t timeout_ns;
};

__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// A load that never lands leaves nothing to unwind to: other blocks may get this shared memory next. So it traps.
__device__ inline void wait_or_trap(cutlass::arch::ClusterTransactionBarrier& barrier, uint32_t phase, uint64_t timeout_ns) {
    if (barrier.try_wait(phase)) return;
    const uint64_t start = global_nanoseconds();
    while (!barrier.try_wait(phase)) {
        if (global_nanoseconds() - start > timeout_ns) __trap();
    }
}

// A segment's description as it lies in memory: fetched a batch ahead, so that no copy waits for the tables.
struct Fetched {
    Segment segment;
    uint32_t device_index;
    uint32_t arena_index;
    bool active;
};

// A warp's stages in the block's shared memory.
struct RingMemory {
    uint8_t* stages;
    uint64_t* targets;
    uint32_t* sizes;
    cutlass::arch::ClusterTransactionBarrier* barriers;

    __device__ static RingMemory of_warp(uint8_t* memory, uint64_t* barrier_words, const BulkShape& shape, uint32_t warp, uint32_t warps) {
        auto* targets = reinterpret_cast<uint64_t*>(memory + warps * shape.stages * shape.stage_bytes);
        auto* sizes = reinterpret_cast<uint32_t*>(targets + warps * shape.stages * kSlotsPerStage);
        auto* barriers = reinterpret_cast<cutlass::arch::ClusterTransactionBarrier*>(barrier_words);
        const uint32_t first = warp * shape.stages;
        return {memory + first * shape.stage_bytes, targets + first * kSlotsPerStage, sizes + first * kSlotsPerStage, barriers + first};
    }
};

class WarpRing {
  public:
    __device__ WarpRing(const PageTransfer& t, const Share& share, const BulkShape& shape, const RingMemory& memory)
        : t_(t), share_(share), shape_(shape), memory_(memory), lane_(threadIdx.x % 32),
          per_stage_(min(kSlotsPerStage, shape.stage_bytes / t.slot_bytes)) {}

    __device__ void run(uint32_t warp, uint32_t warps) {
        const uint32_t batches = (share_.end - share_.begin + per_stage_ - 1) / per_stage_;
        const uint32_t mine = batches > warp ? (batches - warp + warps - 1) / warps : 0;
        const uint32_t ahead = shape_.stages - kStagesDraining;
        uint32_t load_stage = 0, store_stage = 0, phase = 0;
        Fetched next = fetch(warp);
        for (uint32_t i = 0; i < mine + ahead; ++i) {
            if (i < mine) {
                // Stage reuse: all but the newest kStagesDraining - 1 groups have been read out of shared memory.
                cute::tma_store_wait<kStagesDraining - 1>();
                __syncwarp();
                load(next, load_stage);
                load_stage = load_stage + 1 == shape_.stages ? 0 : load_stage + 1;
                next = fetch(warp + (i + 1) * warps);
            }
            if (i >= ahead) {
                store(store_stage, phase);
                if (++store_stage == shape_.stages) store_stage = 0, phase ^= 1;
            }
        }
        finish_stores();
    }

  private:
    __device__ Fetched fetch(uint32_t batch) const {
        Fetched fetched{};
        const uint32_t index = share_.begin + batch * per_stage_ + lane_;
        fetched.active = lane_ < per_stage_ && index < share_.end;
        if (fetched.active) {
            const uint32_t page = index / t_.segments_per_page;
            fetched.segment = t_.segments[index - page * t_.segments_per_page];
            fetched.device_index = uint32_t(t_.device_pages[uint64_t(page) * t_.index_stride]);
            fetched.arena_index = uint32_t(t_.arena_pages[uint64_t(page) * t_.index_stride]);
        }
        return fetched;
    }

    __device__ void load(const Fetched& fetched, uint32_t stage) const {
        const uint32_t bytes = __reduce_add_sync(0xffffffffu, fetched.active ? fetched.segment.bytes : 0u);
        if (lane_ == 0) memory_.barriers[stage].arrive_and_expect_tx(bytes);
        __syncwarp();
        const uint32_t book = stage * kSlotsPerStage + lane_;
        memory_.sizes[book] = fetched.active ? fetched.segment.bytes : 0;
        if (!fetched.active) return;
        const Segment& segment = fetched.segment;
        const uint64_t device = segment.device_base + uint64_t(fetched.device_index / t_.index_stride) * segment.device_stride;
        const uint64_t arena = t_.arena.segment_address(segment, fetched.arena_index / t_.index_stride);
        const bool is_export = t_.direction == Direction::kExport;
        memory_.targets[book] = is_export ? arena : device;
        cute::SM90_BULK_COPY_G2S::copy(reinterpret_cast<const void*>(is_export ? device : arena),
                                       reinterpret_cast<uint64_t*>(&memory_.barriers[stage]), slot(stage), int32_t(segment.bytes));
    }

    __device__ void store(uint32_t stage, uint32_t phase) const {
        const uint32_t book = stage * kSlotsPerStage + lane_;
        const uint32_t bytes = memory_.sizes[book];
        wait_or_trap(memory_.barriers[stage], phase, shape_.timeout_ns);
        if (bytes != 0) {
            cute::SM90_BULK_COPY_S2G::copy(slot(stage), reinterpret_cast<void*>(memory_.targets[book]), int32_t(bytes));
        }
        cute::tma_store_arrive();
    }

    // Waits for the writes themselves, not only for the reads of shared memory: the tag must come after them.
    __device__ static void finish_stores() {
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }

    __device__ uint8_t* slot(uint32_t stage) const { return memory_.stages + stage * shape_.stage_bytes + lane_ * t_.slot_bytes; }

    const PageTransfer& t_;
    const Share& share_;
    const BulkShape& shape_;
    const RingMemory memory_;
    uint32_t lane_;
    uint32_t per_stage_;
};

__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    copy_pages_by_bulk(const PageTransfer t, const BulkShape shape, uint32_t* finished_blocks) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ __align__(8) uint64_t barrier_words[kMaxWarps * kMaxStages];
    auto* barriers = reinterpret_cast<cutlass::arch::ClusterTransactionBarrier*>(barrier_words);
    const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const Share share = Share::of_block(t, blockIdx.x);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < warps * shape.stages; ++i) barriers[i].init(1);
        cutlass::arch::fence_barrier_init();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    open_tags(t, share);
    asm volatile("fence.proxy.async;" ::: "memory");
    if (!share.empty()) {
        WarpRing(t, share, shape, RingMemory::of_warp(stages, barrier_words, shape, warp, warps)).run(warp, warps);
    }
    close_tags(t, share, finished_blocks);
}

}  // namespace specgen

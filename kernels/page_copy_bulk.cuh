// Pages by TMA bulk copies: each warp takes tiles of segments and moves them through a ring of shared-memory stages of
// its own, so no warp waits for another. A stage holds up to 32 segments; lane i moves segment i in (mbarrier) and out
// (bulk group). The ring runs on from tile to tile.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "page_copy_vector.cuh"

namespace specgen {

// Stores of this many stages may still be reading shared memory while newer loads are issued.
constexpr uint32_t kStagesDraining = 2;
constexpr uint32_t kMaxWarps = 8;
constexpr uint32_t kNoTile = 0xffffffffu;

struct BulkShape {
    uint32_t stages;
    uint32_t stage_bytes;
    uint64_t timeout_ns;
};

// A load that never lands leaves nothing to unwind to: other blocks may get this shared memory next. So it traps.
__device__ inline void wait_or_trap(cutlass::arch::ClusterTransactionBarrier& barrier, uint32_t phase,
                                    uint64_t timeout_ns) {
    if (barrier.try_wait(phase)) return;
    const uint64_t start = global_nanoseconds();
    while (!barrier.try_wait(phase)) {
        if (global_nanoseconds() - start > timeout_ns) __trap();
    }
}

// A batch as its description lies in memory: fetched before the one at hand is moved, so that no copy waits for the
// tables.
struct Fetched {
    Segment segment;
    uint32_t device_index;
    uint32_t arena_index;
    uint32_t tile;  // kNoTile: there is nothing left to fetch
    bool active;
};

// The warp's tiles: its own first, then, where tiles are taken in turn, whichever is next.
class TileTaker {
  public:
    __device__ TileTaker(const Tiling& tiling, Progress* progress)
        : tiling_(tiling),
          progress_(progress),
          workers_(gridDim.x * (blockDim.x / 32)),
          tile_(threadIdx.x / 32 * gridDim.x + blockIdx.x) {}

    // The next tile that isn't empty, kNoTile after the last; all lanes call it.
    __device__ uint32_t take(Share& share) {
        for (;;) {
            const uint32_t tile = first_ ? tile_ : in_turn();
            first_ = false;
            if (tile >= tiling_.tiles) return kNoTile;
            share = tiling_.tile(tile);
            if (!share.empty()) return tile;
        }
    }

  private:
    __device__ uint32_t in_turn() const {
        if (tiling_.tiles == workers_) return kNoTile;
        uint32_t taken = 0;
        if (threadIdx.x % 32 == 0) taken = atomicAdd(&progress_->tiles_taken, 1u);
        return workers_ + __shfl_sync(0xffffffffu, taken, 0);
    }

    const Tiling& tiling_;
    Progress* progress_;
    uint32_t workers_;
    uint32_t tile_;
    bool first_ = true;
};

// A warp's stages in the block's shared memory; beside each slot where its bytes go, beside each stage its tile.
struct RingMemory {
    uint8_t* stages;
    uint64_t* targets;
    uint32_t* sizes;
    uint32_t* tiles;
    cutlass::arch::ClusterTransactionBarrier* barriers;

    __device__ static RingMemory of_warp(uint8_t* memory, uint64_t* barrier_words, uint32_t* tile_words,
                                         const BulkShape& shape) {
        const uint32_t warps = blockDim.x / 32, first = threadIdx.x / 32 * shape.stages;
        auto* targets = reinterpret_cast<uint64_t*>(memory + warps * shape.stages * shape.stage_bytes);
        auto* sizes = reinterpret_cast<uint32_t*>(targets + warps * shape.stages * kSlotsPerStage);
        auto* barriers = reinterpret_cast<cutlass::arch::ClusterTransactionBarrier*>(barrier_words);
        return {memory + first * shape.stage_bytes, targets + first * kSlotsPerStage, sizes + first * kSlotsPerStage,
                tile_words + first, barriers + first};
    }
};

class WarpRing {
  public:
    __device__ WarpRing(const PageTransfer& t, const Tiling& tiling, const BulkShape& shape, const Pace& pace,
                        const RingMemory& memory, Progress* progress)
        : t_(t),
          tiling_(tiling),
          shape_(shape),
          memory_(memory),
          taker_(tiling, progress),
          pace_(pace),
          lane_(threadIdx.x % 32),
          per_stage_(min(kSlotsPerStage, shape.stage_bytes / t.slot_bytes)) {}

    __device__ void run() {
        const uint32_t ahead = shape_.stages - kStagesDraining;
        uint32_t load_stage = 0, store_stage = 0, phase = 0, loaded = 0, stored = 0;
        Fetched next = fetch();
        while (next.tile != kNoTile || stored != loaded) {
            const bool loads = next.tile != kNoTile;
            if (loads) {
                // Stage reuse: all but the newest kStagesDraining - 1 groups have been read out of shared memory.
                cute::tma_store_wait<kStagesDraining - 1>();
                __syncwarp();
                load(next, load_stage);
                load_stage = load_stage + 1 == shape_.stages ? 0 : load_stage + 1;
                ++loaded;
                next = fetch();
            }
            if (!loads || loaded - stored > ahead) {
                store(store_stage, phase);
                ++stored;
                if (++store_stage == shape_.stages) store_stage = 0, phase ^= 1;
            }
        }
        turn_to(kNoTile);
        finish_stores();
    }

  private:
    // The next batch's tables. An export's tags are zeroed here and fenced before the tile's first store.
    __device__ Fetched fetch() {
        Fetched fetched{};
        if (at_ == share_.end) {
            fetching_ = taker_.take(share_);
            if (fetching_ == kNoTile) {
                fetched.tile = kNoTile;
                share_ = {at_, at_};
                return fetched;
            }
            at_ = share_.begin;
            if (t_.direction == Direction::kExport) zero_tags(t_, share_, Crew::warp());
        }
        const uint32_t index = at_ + lane_;
        fetched.tile = fetching_;
        fetched.active = lane_ < per_stage_ && index < share_.end;
        at_ = min(at_ + per_stage_, share_.end);
        if (fetched.active) {
            const uint32_t page = index / t_.segments_per_page;
            fetched.segment = t_.segments[index - page * t_.segments_per_page];
            fetched.device_index = uint32_t(t_.device_pages[uint64_t(page) * t_.index_stride]);
            fetched.arena_index = uint32_t(t_.arena_pages[uint64_t(page) * t_.index_stride]);
        }
        return fetched;
    }

    __device__ void load(const Fetched& fetched, uint32_t stage) {
        const uint32_t bytes = __reduce_add_sync(0xffffffffu, fetched.active ? fetched.segment.bytes : 0u);
        pace_.hold(start_, moved_);
        moved_ += bytes;
        if (lane_ == 0) {
            memory_.barriers[stage].arrive_and_expect_tx(bytes);
            memory_.tiles[stage] = fetched.tile;
        }
        __syncwarp();
        const uint32_t book = stage * kSlotsPerStage + lane_;
        memory_.sizes[book] = fetched.active ? fetched.segment.bytes : 0;
        if (!fetched.active) return;
        const Segment& segment = fetched.segment;
        const uint64_t device =
            segment.device_base + uint64_t(fetched.device_index / t_.index_stride) * segment.device_stride;
        const uint64_t arena = t_.arena.segment_address(segment, fetched.arena_index / t_.index_stride);
        const bool is_export = t_.direction == Direction::kExport;
        memory_.targets[book] = is_export ? arena : device;
        cute::SM90_BULK_COPY_G2S::copy(reinterpret_cast<const void*>(is_export ? device : arena),
                                       reinterpret_cast<uint64_t*>(&memory_.barriers[stage]), slot(stage),
                                       int32_t(segment.bytes));
    }

    __device__ void store(uint32_t stage, uint32_t phase) {
        const uint32_t book = stage * kSlotsPerStage + lane_;
        const uint32_t bytes = memory_.sizes[book];
        if (memory_.tiles[stage] != storing_) turn_to(memory_.tiles[stage]);
        wait_or_trap(memory_.barriers[stage], phase, shape_.timeout_ns);
        if (bytes != 0) {
            cute::SM90_BULK_COPY_S2G::copy(slot(stage), reinterpret_cast<void*>(memory_.targets[book]), int32_t(bytes));
        }
        cute::tma_store_arrive();
    }

    // Between the last store of a tile and the first of another: settles the one's tags, and makes sure that the
    // other's are zero before its bytes change. An import's bytes have all been read by then.
    __device__ void turn_to(uint32_t tile) {
        const bool is_export = t_.direction == Direction::kExport;
        if (is_export && storing_ != kNoTile) finish_stores();
        __syncwarp();
        __threadfence_system();
        if (storing_ != kNoTile) settle_tags(t_, tiling_.tile(storing_), Crew::warp());
        __syncwarp();
        asm volatile("fence.proxy.async;" ::: "memory");
        storing_ = tile;
    }

    // Waits for the writes themselves, not only for the reads of shared memory: the tag must come after them.
    __device__ static void finish_stores() {
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
    }

    __device__ uint8_t* slot(uint32_t stage) const {
        return memory_.stages + stage * shape_.stage_bytes + lane_ * t_.slot_bytes;
    }

    const PageTransfer& t_;
    const Tiling& tiling_;
    const BulkShape& shape_;
    const RingMemory memory_;
    TileTaker taker_;
    const Pace& pace_;
    uint32_t lane_;
    uint32_t per_stage_;
    Share share_{0, 0};  // the tile being fetched, from at_ on
    uint32_t at_ = 0;
    uint64_t start_ = global_nanoseconds();
    uint64_t moved_ = 0;
    uint32_t fetching_ = kNoTile;
    uint32_t storing_ = kNoTile;
};

__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    copy_pages_by_bulk(const PageTransfer t, const Tiling tiling, const BulkShape shape, const Pace pace,
                       Progress* progress) {
    extern __shared__ __align__(128) uint8_t stages[];
    __shared__ __align__(8) uint64_t barrier_words[kMaxStagesPerBlock];
    __shared__ uint32_t tile_words[kMaxStagesPerBlock];
    auto* barriers = reinterpret_cast<cutlass::arch::ClusterTransactionBarrier*>(barrier_words);
    const uint32_t warps = blockDim.x / 32;
    for (uint32_t i = threadIdx.x; i < warps * shape.stages; i += blockDim.x) barriers[i].init(1);
    cutlass::arch::fence_barrier_init();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    WarpRing(t, tiling, shape, pace, RingMemory::of_warp(stages, barrier_words, tile_words, shape), progress).run();
    close_cut_pages(t, tiling, tiling.tiles != gridDim.x * warps, progress);
}

}  // namespace specgen

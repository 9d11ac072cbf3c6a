#include "staging_ring.hpp"

#include <algorithm>
#include <numeric>

#include "../utils/driver.hpp"

namespace specgen {
namespace {

// So few copies are enqueued one by one.
constexpr size_t kFewEntries = 16;

cudaEvent_t make_event() {
    cudaEvent_t event = nullptr;
    check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    return event;
}

void follow(cudaStream_t follower, cudaEvent_t event, cudaStream_t leader) {
    check_cuda(cudaEventRecord(event, leader), "ordering a piece");
    check_cuda(cudaStreamWaitEvent(follower, event, 0), "ordering a piece");
}

}  // namespace

void EngineBatch::add(uint64_t target, uint64_t source, uint64_t bytes) {
    targets.push_back(target);
    sources.push_back(source);
    sizes.push_back(bytes);
}

void EngineBatch::enqueue(cudaStream_t stream) {
    if (sizes.size() <= kFewEntries) {
        for (size_t i = 0; i < sizes.size(); ++i)
            check_cuda(cudaMemcpyAsync(reinterpret_cast<void*>(targets[i]), reinterpret_cast<const void*>(sources[i]),
                                       sizes[i], cudaMemcpyDefault, stream),
                       "cudaMemcpyAsync");
    } else {
        enqueue_engine_batch(targets.data(), sources.data(), sizes.data(), sizes.size(), stream);
    }
    targets.clear(), sources.clear(), sizes.clear();
}

void enqueue_engine_batch(const uint64_t* targets, const uint64_t* sources, const uint64_t* sizes, size_t count,
                          cudaStream_t stream) {
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    check_cuda(
        cudaMemcpyBatchAsync(reinterpret_cast<void* const*>(targets), reinterpret_cast<const void* const*>(sources),
                             reinterpret_cast<const size_t*>(sizes), count, &attributes, &first, 1, stream),
        "cudaMemcpyBatchAsync");
}

bool StagingRing::fits(const PageLayout& layout, uint64_t bytes) {
    return layout.layout == ArenaLayout::kPageFirst && bytes / kPieces >= layout.page_bytes;
}

StagingRing::StagingRing(const PageLayout& layout, uint64_t bytes, uint32_t engines)
    : page_bytes_(layout.page_bytes), piece_pages_(uint32_t(bytes / kPieces / layout.page_bytes)), engines_(engines) {
    if (engines == 0 || kPieces % engines != 0)
        throw UsageError(concat("engines=", engines, ": use 1, 2 or ", kPieces));
    if (!fits(layout, bytes))
        throw UsageError(concat("staging_bytes=", bytes, " hold no ", kPieces, " pages of ", layout.page_bytes,
                                " bytes, or the arena isn't page-first"));
    const uint32_t pages = kPieces * piece_pages_;
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&memory_), pages * page_bytes_), "staging memory");
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&slots_), pages * sizeof(int64_t)), "staging page table");
    std::vector<int64_t> slots(pages);
    std::iota(slots.begin(), slots.end(), 0);
    check_cuda(cudaMemcpy(slots_, slots.data(), pages * sizeof(int64_t), cudaMemcpyHostToDevice), "staging page table");
    for (Engine& engine : engines_) {
        check_cuda(cudaStreamCreateWithFlags(&engine.stream, cudaStreamNonBlocking), "cudaStreamCreate");
        engine.order = make_event();
    }
    for (Piece& piece : pieces_) piece = {make_event(), make_event()};
}

StagingRing::~StagingRing() {
    for (Engine& engine : engines_) cudaStreamSynchronize(engine.stream);
    for (Piece& piece : pieces_) {
        cudaEventDestroy(piece.by_sms);
        cudaEventDestroy(piece.by_engine);
    }
    for (Engine& engine : engines_) {
        cudaEventDestroy(engine.order);
        cudaStreamDestroy(engine.stream);
    }
    cudaFree(slots_);
    cudaFree(memory_);
}

// The pages at positions first, first + 1, ... with the ring in the arena's place.
PageTransfer StagingRing::local(const PageTransfer& transfer, uint32_t first, uint32_t pages) const {
    PageTransfer part = transfer;
    part.device_pages += first;
    part.arena_pages = slots_ + first / piece_pages_ % kPieces * piece_pages_;
    part.arena = {uint64_t(memory_), piece_pages_ * page_bytes_, 0, piece_pages_, 0};
    part.pages = pages;
    part.tagged = false;
    return part;
}

void StagingRing::add_runs(const PageTransfer& transfer, const StagingPlan& plan,
                           const std::vector<int64_t>& arena_pages, uint32_t first, uint32_t& run) {
    const uint64_t piece = uint64_t(memory_) + first / piece_pages_ % kPieces * piece_pages_ * page_bytes_;
    for (; run < plan.runs.size() && plan.runs[run].first < first + piece_pages_; ++run) {
        const Run& pages = plan.runs[run];
        const uint32_t page = uint32_t(arena_pages[pages.first]);
        const uint64_t here = piece + (pages.first - first) * page_bytes_;
        const uint64_t there = transfer.arena.chunk_address(page) + page % transfer.arena.pages_per_chunk * page_bytes_;
        const bool is_export = transfer.direction == Direction::kExport;
        batch_.add(is_export ? there : here, is_export ? here : there, pages.pages * page_bytes_);
    }
}

void StagingRing::carry(const PageTransfer& transfer, const StagingPlan& plan, const std::vector<int64_t>& arena_pages,
                        const LaunchShape& shape, Progress* progress, cudaStream_t stream) {
    for (Engine& engine : engines_) follow(engine.stream, engine.order, stream);
    uint32_t run = 0;
    for (uint32_t first = 0; first < plan.packed; first += piece_pages_) {
        Piece& piece = pieces_[first / piece_pages_ % kPieces];
        const cudaStream_t engine = engines_[first / piece_pages_ % engines_.size()].stream;
        const PageTransfer part = local(transfer, first, std::min(piece_pages_, plan.packed - first));
        const bool reused = first / piece_pages_ >= kPieces;
        add_runs(transfer, plan, arena_pages, first, run);
        if (transfer.direction == Direction::kExport) {
            if (reused) check_cuda(cudaStreamWaitEvent(stream, piece.by_engine, 0), "reusing a piece");
            check_cuda(launch_page_copy(part, shape, progress, stream), "packing pages");
            follow(engine, piece.by_sms, stream);
            batch_.enqueue(engine);
            check_cuda(cudaEventRecord(piece.by_engine, engine), "ordering a piece");
        } else {
            if (reused) check_cuda(cudaStreamWaitEvent(engine, piece.by_sms, 0), "reusing a piece");
            batch_.enqueue(engine);
            follow(stream, piece.by_engine, engine);
            check_cuda(launch_page_copy(part, shape, progress, stream), "unpacking pages");
            check_cuda(cudaEventRecord(piece.by_sms, stream), "ordering a piece");
        }
    }
    for (Engine& engine : engines_) follow(stream, engine.order, engine.stream);
}

}  // namespace specgen

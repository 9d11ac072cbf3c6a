#include "cuda_copier.hpp"

#include <algorithm>
#include <cstring>

#include "../utils/driver.hpp"

namespace specgen {
namespace {

constexpr uint32_t kLanes = 16;
constexpr uint32_t kRestLane = kLanes;
constexpr uint32_t kAllLanes = kLanes + 1;
// Packing a smaller part than 1 / so many of a transfer isn't worth a second kernel.
constexpr uint32_t kLeastPackedShare = 4;
constexpr uint64_t kBytesPerPage = 3 * sizeof(int64_t) + sizeof(int32_t);

cudaStream_t as_stream(uint64_t stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}

}  // namespace

// Page tables on their way to the device, flags on their way back: pinned and device memory of one transfer.
struct CudaCopier::Staging {
    explicit Staging(uint32_t capacity) : capacity(capacity) {
        check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&host), capacity * kBytesPerPage, cudaHostAllocDefault),
                   "pinned page tables");
        check_cuda(cudaMalloc(reinterpret_cast<void**>(&device), capacity * kBytesPerPage), "device page tables");
        check_cuda(cudaEventCreateWithFlags(&finished, cudaEventDisableTiming), "cudaEventCreate");
    }
    ~Staging() {
        cudaEventDestroy(finished);
        cudaFree(device);
        cudaFreeHost(host);
    }
    uint64_t flags_offset(uint32_t pages) const { return pages * 3 * sizeof(int64_t); }

    uint32_t capacity;
    uint8_t* host = nullptr;
    uint8_t* device = nullptr;
    cudaEvent_t finished = nullptr;
};

CudaCopier::CudaCopier(PageLayout layout, uint64_t arena_base, int device, const CopierOptions& options)
    : layout_(std::move(layout)), arena_base_(arena_base), device_(device), options_(options) {
    if (options.sm_budget == 0) throw UsageError("sm_budget=0: a copy needs at least one SM");
    DeviceGuard guard(device);
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, least), "cudaStreamCreate");
    check_cuda(cudaStreamCreateWithPriority(&rest_, cudaStreamNonBlocking, least), "cudaStreamCreate");
    check_cuda(cudaEventCreateWithFlags(&order_, cudaEventDisableTiming), "cudaEventCreate");
    check_cuda(cudaEventCreateWithFlags(&rest_order_, cudaEventDisableTiming), "cudaEventCreate");
    const size_t bytes = layout_.segments.size() * sizeof(Segment);
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&segments_), bytes), "segment table");
    check_cuda(cudaMemcpy(segments_, layout_.segments.data(), bytes, cudaMemcpyHostToDevice), "segment table");
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&progress_), kAllLanes * sizeof(Progress)), "lane counters");
    check_cuda(cudaMemset(progress_, 0, kAllLanes * sizeof(Progress)), "lane counters");
    check_cuda(prepare_page_copy(kSharedBytesPerBlock), "shared memory limit");
    if (StagingRing::fits(layout_, options.staging_bytes))
        ring_ = std::make_unique<StagingRing>(layout_, options.staging_bytes, options.staging_engines);
    check_cuda(cudaDeviceSynchronize(), "preparing the copier");
}

CudaCopier::~CudaCopier() {
    int previous = 0;
    cudaGetDevice(&previous);
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaStreamSynchronize(rest_);
    ring_.reset();
    tickets_.clear();
    idle_.clear();
    cudaFree(progress_);
    cudaFree(segments_);
    cudaEventDestroy(order_);
    cudaEventDestroy(rest_order_);
    cudaStreamDestroy(rest_);
    cudaStreamDestroy(stream_);
    cudaSetDevice(previous);
}

CopyConfig CudaCopier::select(Direction direction, uint32_t pages) const {
    CopyConfig config =
        select_copy_config(layout_.slot_bytes, uint64_t(pages) * layout_.page_bytes, direction, options_.sm_budget);
    config.max_gbps = options_.max_gbps;
    return config;
}

CopyPath CudaCopier::path_for(uint32_t pages) const {
    return select_copy_path(uint64_t(pages) * layout_.page_bytes, ring_ != nullptr, options_.max_gbps > 0);
}

PageTransfer CudaCopier::transfer_of(Direction direction, const DeviceTables& tables) const {
    return {segments_,
            reinterpret_cast<const int64_t*>(tables.device_pages),
            reinterpret_cast<const int64_t*>(tables.arena_pages),
            reinterpret_cast<const uint64_t*>(tables.generations),
            reinterpret_cast<int32_t*>(tables.flags),
            layout_.view(arena_base_),
            tables.pages,
            uint32_t(layout_.segments.size()),
            layout_.slot_bytes,
            tables.index_stride,
            direction};
}

LaunchShape CudaCopier::shape_of(const CopyConfig& config) const {
    return {config.method == "bulk" ? CopyMethod::kBulk : CopyMethod::kVector,
            config.sms,
            config.warps,
            config.stages,
            config.stage_bytes,
            config.tiles_per_warp,
            config.picoseconds_per_kib(),
            uint64_t(options_.timeout_ms) * 1000000};
}

void CudaCopier::check_addressable(uint32_t pages) const {
    const uint64_t vectors = uint64_t(pages) * layout_.segments.size() * ((layout_.slot_bytes + 15) / 16);
    if (vectors > UINT32_MAX)
        throw UsageError(concat(pages, " pages are more than one launch addresses (64 GiB): split the transfer"));
}

void CudaCopier::launch(Direction direction, const DeviceTables& tables, const CopyConfig& config, uint64_t stream,
                        uint32_t lane) {
    if (lane >= kLanes) throw UsageError(concat("lane=", lane, ": use 0 to ", kLanes - 1));
    if (tables.index_stride == 0) throw UsageError("index_stride=0: use 1, or the page size for token indices");
    if (direction == Direction::kImport && tables.flags == 0)
        throw UsageError("flags=0: an import must have somewhere to report stale pages");
    check_copy_config(config, layout_.slot_bytes);
    check_addressable(tables.pages);
    DeviceGuard guard(device_);
    check_cuda(launch_page_copy(transfer_of(direction, tables), shape_of(config), progress_ + lane, as_stream(stream)),
               "page copy launch");
}

std::unique_ptr<CudaCopier::Staging> CudaCopier::staging_for(uint32_t pages) {
    for (auto& entry : idle_) {
        if (entry->capacity < pages) continue;
        auto found = std::move(entry);
        entry = std::move(idle_.back());
        idle_.pop_back();
        return found;
    }
    uint32_t capacity = 256;
    while (capacity < pages) capacity *= 2;
    return std::make_unique<Staging>(capacity);
}

uint64_t CudaCopier::submit(Direction direction, const PageList& given, uint64_t after_stream, CopyPath path) {
    given.check();
    DeviceGuard guard(device_);
    const uint32_t count = uint32_t(given.arena_pages.size());
    check_addressable(count);
    const bool asked = path == CopyPath::kStaged;
    if (path == CopyPath::kAuto) path = path_for(count);
    StagingPlan plan;
    if (path == CopyPath::kStaged) {
        if (ring_ == nullptr)
            throw UsageError("path=STAGED: the arena must be page-first and staging_bytes hold four of its pages");
        plan = plan_staging(given.arena_pages, layout_.pages_per_chunk, ring_->piece_pages(),
                            most_runs_for(count * layout_.page_bytes));
        if (!asked && plan.packed < count / kLeastPackedShare) path = CopyPath::kDirect;
    }
    const bool staged = path == CopyPath::kStaged;
    if (path != CopyPath::kDirect && options_.max_gbps > 0)
        throw UsageError(concat("max_gbps=", options_.max_gbps, ": only CopyPath.DIRECT keeps a pace"));
    PageList reordered;
    if (staged) reordered = given.reordered(plan.order);
    const PageList& pages = staged ? reordered : given;
    auto staging = staging_for(count);
    const size_t column = count * sizeof(int64_t);
    std::memcpy(staging->host, pages.device_pages.data(), column);
    std::memcpy(staging->host + column, pages.arena_pages.data(), column);
    std::memcpy(staging->host + 2 * column, pages.generations.data(), column);
    check_cuda(cudaEventRecord(order_, as_stream(after_stream)), "ordering after the caller's stream");
    check_cuda(cudaStreamWaitEvent(stream_, order_, 0), "ordering after the caller's stream");
    check_cuda(cudaMemcpyAsync(staging->device, staging->host, 3 * column, cudaMemcpyHostToDevice, stream_),
               "page tables");
    const uint64_t at = uint64_t(staging->device);
    const uint64_t flags = at + staging->flags_offset(count);
    const DeviceTables tables{at, at + column, at + 2 * column, flags, count, 1};
    if (staged) {
        copy_staged(transfer_of(direction, tables), pages, plan);
    } else if (path == CopyPath::kEngine) {
        copy_by_engine(transfer_of(direction, tables), pages);
    } else {
        launch(direction, tables, select(direction, count), uint64_t(stream_), 0);
    }
    if (direction == Direction::kImport) {
        auto* host_flags = staging->host + staging->flags_offset(count);
        check_cuda(cudaMemcpyAsync(host_flags, reinterpret_cast<void*>(flags), count * sizeof(int32_t),
                                   cudaMemcpyDeviceToHost, stream_),
                   "page flags");
    }
    check_cuda(cudaEventRecord(staging->finished, stream_), "copy event");
    tickets_[++submitted_] = {std::move(staging), count, direction,
                              staged ? std::move(plan.order) : std::vector<uint32_t>{}};
    return submitted_;
}

void CudaCopier::copy_by_engine(const PageTransfer& transfer, const PageList& pages) {
    const bool is_export = transfer.direction == Direction::kExport;
    EngineBatch batch;
    for (size_t i = 0; i < pages.arena_pages.size(); ++i) {
        for (const Segment& row : layout_.rows()) {
            const uint64_t here = row.device_base + uint64_t(pages.device_pages[i]) * row.device_stride;
            const uint64_t there = transfer.arena.segment_address(row, uint32_t(pages.arena_pages[i]));
            batch.add(is_export ? there : here, is_export ? here : there, row.bytes);
        }
    }
    if (is_export) check_cuda(launch_page_marks(transfer, true, stream_), "zeroing tags");
    batch.enqueue(stream_);
    check_cuda(launch_page_marks(transfer, false, stream_), "tags");
}

// Pages that aren't packed go directly, beside the packing, by the larger part of the SMs.
void CudaCopier::copy_staged(const PageTransfer& transfer, const PageList& pages, const StagingPlan& plan) {
    const bool mixed = plan.packed < transfer.pages;
    const uint32_t packing = mixed ? std::max(1u, options_.sm_budget * 3 / 8) : options_.sm_budget;
    PageTransfer packed = transfer;
    packed.pages = plan.packed;
    if (packed.direction == Direction::kExport) check_cuda(launch_page_marks(packed, true, stream_), "zeroing tags");
    if (mixed) launch_rest(transfer, plan.packed, std::max(1u, options_.sm_budget - packing));
    // Equal shares, as an import has them: local memory serves the SMs alike.
    const uint64_t piece_bytes = ring_->piece_pages() * layout_.page_bytes;
    const CopyConfig config = select_copy_config(layout_.slot_bytes, piece_bytes, Direction::kImport, packing);
    ring_->carry(packed, plan, pages.arena_pages, shape_of(config), progress_, stream_);
    if (mixed) check_cuda(cudaStreamWaitEvent(stream_, rest_order_, 0), "joining the direct copy");
    check_cuda(launch_page_marks(packed, false, stream_), "tags");
}

void CudaCopier::launch_rest(const PageTransfer& transfer, uint32_t first, uint32_t sms) {
    PageTransfer rest = transfer;
    rest.device_pages += first;
    rest.arena_pages += first;
    rest.generations += first;
    rest.flags += first;
    rest.pages -= first;
    const CopyConfig config =
        select_copy_config(layout_.slot_bytes, rest.pages * layout_.page_bytes, rest.direction, sms);
    check_cuda(cudaEventRecord(rest_order_, stream_), "starting the direct copy");
    check_cuda(cudaStreamWaitEvent(rest_, rest_order_, 0), "starting the direct copy");
    check_cuda(launch_page_copy(rest, shape_of(config), progress_ + kRestLane, rest_), "page copy launch");
    check_cuda(cudaEventRecord(rest_order_, rest_), "ending the direct copy");
}

CudaCopier::Ticket& CudaCopier::ticket_of(uint64_t ticket) {
    const auto entry = tickets_.find(ticket);
    if (entry == tickets_.end())
        throw UsageError(concat("copy ", ticket, " is unknown, or its flags were taken before"));
    return entry->second;
}

bool CudaCopier::done(uint64_t ticket) {
    const auto entry = tickets_.find(ticket);
    if (entry == tickets_.end()) return ticket != 0 && ticket <= submitted_;
    const cudaError_t status = cudaEventQuery(entry->second.staging->finished);
    if (status == cudaErrorNotReady) return false;
    check_cuda(status, "page copy");
    return true;
}

std::vector<int32_t> CudaCopier::take_flags(uint64_t ticket) {
    Ticket& entry = ticket_of(ticket);
    if (!done(ticket)) throw UsageError(concat("copy ", ticket, " is unfinished"));
    std::vector<int32_t> flags(entry.direction == Direction::kImport ? entry.pages : 0);
    const auto* found =
        reinterpret_cast<const int32_t*>(entry.staging->host + entry.staging->flags_offset(entry.pages));
    for (size_t i = 0; i < flags.size(); ++i) flags[entry.order.empty() ? i : entry.order[i]] = found[i];
    idle_.push_back(std::move(entry.staging));
    tickets_.erase(ticket);
    return flags;
}

void CudaCopier::order_after(uint64_t ticket, uint64_t stream) {
    DeviceGuard guard(device_);
    check_cuda(cudaStreamWaitEvent(as_stream(stream), ticket_of(ticket).staging->finished, 0), "ordering after a copy");
}

}  // namespace specgen

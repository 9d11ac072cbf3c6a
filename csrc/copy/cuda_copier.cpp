#include "cuda_copier.hpp"

#include <cstring>

#include "../utils/driver.hpp"

namespace specgen {
namespace {

constexpr uint32_t kLanes = 16;
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

CudaCopier::CudaCopier(PageLayout layout, uint64_t arena_base, int device, uint32_t sm_budget, double max_gbps,
                       uint32_t timeout_ms)
    : layout_(std::move(layout)),
      arena_base_(arena_base),
      device_(device),
      sm_budget_(sm_budget),
      max_gbps_(max_gbps),
      timeout_ns_(uint64_t(timeout_ms) * 1000000) {
    if (sm_budget == 0) throw UsageError("sm_budget=0: a copy needs at least one SM");
    DeviceGuard guard(device);
    int least = 0, greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities");
    check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, least), "cudaStreamCreate");
    check_cuda(cudaEventCreateWithFlags(&order_, cudaEventDisableTiming), "cudaEventCreate");
    const size_t bytes = layout_.segments.size() * sizeof(Segment);
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&segments_), bytes), "segment table");
    check_cuda(cudaMemcpy(segments_, layout_.segments.data(), bytes, cudaMemcpyHostToDevice), "segment table");
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&progress_), kLanes * sizeof(Progress)), "lane counters");
    check_cuda(cudaMemset(progress_, 0, kLanes * sizeof(Progress)), "lane counters");
    check_cuda(prepare_page_copy(kSharedBytesPerBlock), "shared memory limit");
    check_cuda(cudaDeviceSynchronize(), "preparing the copier");
}

CudaCopier::~CudaCopier() {
    int previous = 0;
    cudaGetDevice(&previous);
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    tickets_.clear();
    idle_.clear();
    cudaFree(progress_);
    cudaFree(segments_);
    cudaEventDestroy(order_);
    cudaStreamDestroy(stream_);
    cudaSetDevice(previous);
}

CopyConfig CudaCopier::select(Direction direction, uint32_t pages) const {
    CopyConfig config =
        select_copy_config(layout_.slot_bytes, uint64_t(pages) * layout_.page_bytes, direction, sm_budget_);
    config.max_gbps = max_gbps_;
    return config;
}

void CudaCopier::launch(Direction direction, const DeviceTables& tables, const CopyConfig& config, uint64_t stream,
                        uint32_t lane) {
    if (lane >= kLanes) throw UsageError(concat("lane=", lane, ": use 0 to ", kLanes - 1));
    if (tables.index_stride == 0) throw UsageError("index_stride=0: use 1, or the page size for token indices");
    if (direction == Direction::kImport && tables.flags == 0)
        throw UsageError("flags=0: an import must have somewhere to report stale pages");
    check_copy_config(config, layout_.slot_bytes);
    const uint64_t vectors = uint64_t(tables.pages) * layout_.segments.size() * ((layout_.slot_bytes + 15) / 16);
    if (vectors > UINT32_MAX)
        throw UsageError(
            concat(tables.pages, " pages are more than one launch addresses (64 GiB): split the transfer"));
    DeviceGuard guard(device_);
    const PageTransfer transfer{segments_,
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
    const CopyMethod method = config.method == "bulk" ? CopyMethod::kBulk : CopyMethod::kVector;
    const LaunchShape shape{method,
                            config.sms,
                            config.warps,
                            config.stages,
                            config.stage_bytes,
                            config.tiles_per_warp,
                            config.picoseconds_per_kib(),
                            timeout_ns_};
    check_cuda(launch_page_copy(transfer, shape, progress_ + lane, as_stream(stream)), "page copy launch");
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

uint64_t CudaCopier::submit(Direction direction, const PageList& pages, uint64_t after_stream) {
    pages.check();
    DeviceGuard guard(device_);
    const uint32_t count = uint32_t(pages.arena_pages.size());
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
    launch(direction, {at, at + column, at + 2 * column, flags, count, 1}, select(direction, count), uint64_t(stream_),
           0);
    if (direction == Direction::kImport) {
        auto* host_flags = staging->host + staging->flags_offset(count);
        check_cuda(cudaMemcpyAsync(host_flags, reinterpret_cast<void*>(flags), count * sizeof(int32_t),
                                   cudaMemcpyDeviceToHost, stream_),
                   "page flags");
    }
    check_cuda(cudaEventRecord(staging->finished, stream_), "copy event");
    tickets_[++submitted_] = {std::move(staging), count, direction};
    return submitted_;
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
    std::memcpy(flags.data(), entry.staging->host + entry.staging->flags_offset(entry.pages),
                flags.size() * sizeof(int32_t));
    idle_.push_back(std::move(entry.staging));
    tickets_.erase(ticket);
    return flags;
}

void CudaCopier::order_after(uint64_t ticket, uint64_t stream) {
    DeviceGuard guard(device_);
    check_cuda(cudaStreamWaitEvent(as_stream(stream), ticket_of(ticket).staging->finished, 0), "ordering after a copy");
}

}  // namespace specgen

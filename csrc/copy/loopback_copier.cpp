#include "loopback_copier.hpp"

#include <atomic>
#include <chrono>
#include <cstring>

#include "../utils/error.hpp"

namespace specgen {
namespace {

void copy_one_page(const PageLayout& layout, const ArenaView& view, Direction direction, int64_t device_page,
                   int64_t arena_page) {
    for (const Segment& segment : layout.segments) {
        auto* device = reinterpret_cast<void*>(segment.device_base + uint64_t(device_page) * segment.device_stride);
        auto* arena = reinterpret_cast<void*>(view.segment_address(segment, uint32_t(arena_page)));
        direction == Direction::kExport ? std::memcpy(arena, device, segment.bytes)
                                        : std::memcpy(device, arena, segment.bytes);
    }
}

}  // namespace

void PageList::check() const {
    if (device_pages.size() != arena_pages.size() || arena_pages.size() != generations.size()) {
        throw UsageError(concat(device_pages.size(), " device pages, ", arena_pages.size(), " arena pages, ",
                                generations.size(), " generations: the counts must agree"));
    }
}

PageList PageList::reordered(const std::vector<uint32_t>& order) const {
    PageList list;
    for (auto [from, to] : {std::pair{&device_pages, &list.device_pages}, std::pair{&arena_pages, &list.arena_pages}}) {
        to->reserve(order.size());
        for (const uint32_t position : order) to->push_back((*from)[position]);
    }
    list.generations.reserve(order.size());
    for (const uint32_t position : order) list.generations.push_back(generations[position]);
    return list;
}

void copy_pages(const PageLayout& layout, uint64_t arena_base, Direction direction, const PageList& pages,
                int32_t* flags) {
    const ArenaView view = layout.view(arena_base);
    for (size_t i = 0; i < pages.arena_pages.size(); ++i) {
        auto* tag = reinterpret_cast<uint64_t*>(view.tag_address(uint32_t(pages.arena_pages[i])));
        if (direction == Direction::kExport) {
            __atomic_store_n(tag, 0, __ATOMIC_SEQ_CST);
            copy_one_page(layout, view, direction, pages.device_pages[i], pages.arena_pages[i]);
            __atomic_store_n(tag, pages.generations[i], __ATOMIC_RELEASE);
        } else {
            copy_one_page(layout, view, direction, pages.device_pages[i], pages.arena_pages[i]);
            std::atomic_thread_fence(std::memory_order_acquire);
            flags[i] = __atomic_load_n(tag, __ATOMIC_ACQUIRE) == pages.generations[i] ? kPageMatches : kPageStale;
        }
    }
}

LoopbackCopier::LoopbackCopier(PageLayout layout, uint64_t arena_base, uint32_t page_delay_us)
    : layout_(std::move(layout)), arena_base_(arena_base), page_delay_us_(page_delay_us), worker_([this] { work(); }) {}

LoopbackCopier::~LoopbackCopier() {
    {
        std::lock_guard lock(mutex_);
        closing_ = true;
    }
    changed_.notify_all();
    worker_.join();
}

uint64_t LoopbackCopier::submit(Direction direction, PageList pages) {
    pages.check();
    std::lock_guard lock(mutex_);
    queue_.push_back({++submitted_, direction, std::move(pages)});
    changed_.notify_all();
    return submitted_;
}

bool LoopbackCopier::done(uint64_t ticket) {
    std::lock_guard lock(mutex_);
    return completed_ >= ticket;
}

bool LoopbackCopier::wait(uint64_t ticket, int timeout_ms) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return completed_ >= ticket; });
}

std::vector<int32_t> LoopbackCopier::take_flags(uint64_t ticket) {
    std::lock_guard lock(mutex_);
    const auto entry = finished_.find(ticket);
    if (entry == finished_.end())
        throw UsageError(concat("copy ", ticket, " is unfinished, or its flags were taken before"));
    auto flags = std::move(entry->second);
    finished_.erase(entry);
    return flags;
}

void LoopbackCopier::work() {
    for (;;) {
        Job job;
        {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [&] { return closing_ || !queue_.empty(); });
            if (queue_.empty()) return;
            job = std::move(queue_.front());
            queue_.pop_front();
        }
        if (page_delay_us_ > 0)
            std::this_thread::sleep_for(std::chrono::microseconds(page_delay_us_ * job.pages.arena_pages.size()));
        std::vector<int32_t> flags(job.direction == Direction::kImport ? job.pages.arena_pages.size() : 0,
                                   kPageUnchecked);
        copy_pages(layout_, arena_base_, job.direction, job.pages, flags.data());
        {
            std::lock_guard lock(mutex_);
            finished_[job.ticket] = std::move(flags);
            completed_ = job.ticket;
        }
        changed_.notify_all();
    }
}

}  // namespace specgen

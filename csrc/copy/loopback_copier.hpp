// The page copy without a GPU: one worker thread stands for the stream, a sequence number for the event.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "page_layout.hpp"

namespace specgen {

struct PageList {
    std::vector<int64_t> device_pages;
    std::vector<int64_t> arena_pages;
    std::vector<uint64_t> generations;

    void check() const;  // throws UsageError on unequal lengths
    PageList reordered(const std::vector<uint32_t>& order) const;
};

// The kernel's contract in plain C++: tags zeroed before, written after (export); flags set (import).
void copy_pages(const PageLayout& layout, uint64_t arena_base, Direction direction, const PageList& pages,
                int32_t* flags);

class LoopbackCopier {
  public:
    // `page_delay_us` slows every page down, so that tests can catch copies in flight.
    LoopbackCopier(PageLayout layout, uint64_t arena_base, uint32_t page_delay_us);
    ~LoopbackCopier();

    // Copies run in the order of submission. The ticket stays valid until its flags are taken.
    uint64_t submit(Direction direction, PageList pages);
    bool done(uint64_t ticket);
    bool wait(uint64_t ticket, int timeout_ms);
    // PageFlag a page (empty for an export); throws UsageError when the ticket is unfinished or was taken before.
    std::vector<int32_t> take_flags(uint64_t ticket);

  private:
    struct Job {
        uint64_t ticket;
        Direction direction;
        PageList pages;
    };
    void work();

    PageLayout layout_;
    uint64_t arena_base_;
    uint32_t page_delay_us_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Job> queue_;
    std::map<uint64_t, std::vector<int32_t>> finished_;
    uint64_t submitted_ = 0;
    uint64_t completed_ = 0;
    bool closing_ = false;
    std::thread worker_;
};

}  // namespace specgen

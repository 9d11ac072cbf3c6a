#include "loopback_space.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>

#include "../utils/error.hpp"

namespace specgen {
namespace {
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;
}

ScopedFd create_loopback_chunk(uint64_t bytes) {
    ScopedFd fd(::memfd_create("specgen-kv-chunk", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (fd.get() < 0) throw system_failure("memfd_create");
    if (::ftruncate(fd.get(), off_t(bytes)) != 0) throw system_failure(concat("shared memory of ", bytes, " bytes"));
    if (::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) throw system_failure("F_ADD_SEALS");
    return fd;
}

LoopbackSpace::LoopbackSpace(uint32_t slots, uint64_t chunk_bytes) : chunk_bytes_(chunk_bytes), mapped_(slots, false) {
    if (slots == 0 || chunk_bytes == 0 || chunk_bytes % uint64_t(::sysconf(_SC_PAGESIZE)) != 0) {
        throw UsageError(
            concat("slots=", slots, ", chunk_bytes=", chunk_bytes, ": need at least one slot and whole system pages"));
    }
    void* base = ::mmap(nullptr, slots * chunk_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw system_failure(concat("reserving ", slots * chunk_bytes, " bytes of addresses"));
    base_ = static_cast<uint8_t*>(base);
}

LoopbackSpace::~LoopbackSpace() {
    ::munmap(base_, mapped_.size() * chunk_bytes_);
}

void LoopbackSpace::require_state(uint32_t slot, bool mapped) const {
    if (slot >= mapped_.size()) throw UsageError(concat("slot ", slot, " lies outside the ", mapped_.size(), " slots"));
    if (mapped_[slot] != mapped)
        throw UsageError(concat("slot ", slot, mapped ? " holds no chunk" : " already holds a chunk"));
}

void LoopbackSpace::map(uint32_t slot, int fd) {
    require_state(slot, false);
    struct stat status{};
    if (::fstat(fd, &status) != 0) throw system_failure("fstat of a chunk's descriptor");
    if (uint64_t(status.st_size) != chunk_bytes_)
        throw UsageError(concat("chunk of ", status.st_size, " bytes where ", chunk_bytes_, " were agreed"));
    const int seals = ::fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & kSeals) != kSeals)
        throw UsageError("chunk's memory is not sealed against resizing: it did not come from a lender");
    void* at = base_ + slot * chunk_bytes_;
    if (::mmap(at, chunk_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
        throw system_failure("mapping a chunk");
    mapped_[slot] = true;
}

void LoopbackSpace::unmap(uint32_t slot) {
    require_state(slot, true);
    void* at = base_ + slot * chunk_bytes_;
    constexpr int kReserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (::mmap(at, chunk_bytes_, PROT_NONE, kReserved, -1, 0) == MAP_FAILED) throw system_failure("unmapping a chunk");
    mapped_[slot] = false;
}

uint32_t LoopbackSpace::mapped() const {
    return uint32_t(std::count(mapped_.begin(), mapped_.end(), true));
}

}  // namespace specgen

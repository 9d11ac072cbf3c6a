#include "cuda_space.hpp"

#include <algorithm>

#include "../utils/driver.hpp"

namespace specgen {
namespace {

constexpr uint64_t kGranularity = 2u << 20;

void check_chunk_bytes(uint64_t bytes) {
    if (bytes == 0 || bytes % kGranularity != 0)
        throw UsageError(concat("chunk_bytes=", bytes, " must be a positive multiple of 2 MiB"));
}

// cuMem* calls need the device's primary context: cudaFree(0) makes one.
void make_context() {
    check_cuda(cudaFree(nullptr), "starting CUDA on the device");
}

}  // namespace

CudaChunk::CudaChunk(int device, uint64_t bytes) {
    check_chunk_bytes(bytes);
    DeviceGuard guard(device);
    make_context();
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    check_driver(driver().mem_create(&handle_, bytes, &properties, 0), "cuMemCreate of a chunk");
    owned_ = true;
}

ScopedFd CudaChunk::export_fd() const {
    if (!owned_) throw UsageError("the chunk was released: it has no descriptor to export");
    int fd = -1;
    check_driver(driver().mem_export(&fd, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                 "cuMemExportToShareableHandle");
    return ScopedFd(fd);
}

void CudaChunk::release() noexcept {
    if (std::exchange(owned_, false)) driver().mem_release(handle_);
}

CudaSpace::CudaSpace(int device, uint32_t slots, uint64_t chunk_bytes)
    : device_(device), chunk_bytes_(chunk_bytes), mapped_(slots, false) {
    check_chunk_bytes(chunk_bytes);
    if (slots == 0) throw UsageError("slots=0: an arena needs at least one");
    DeviceGuard guard(device);
    make_context();
    check_driver(driver().address_reserve(&base_, slots * chunk_bytes, 0, 0, 0), "cuMemAddressReserve");
}

CudaSpace::~CudaSpace() {
    for (uint32_t slot = 0; slot < mapped_.size(); ++slot) {
        if (mapped_[slot]) driver().mem_unmap(base_ + slot * chunk_bytes_, chunk_bytes_);
    }
    if (base_ != 0) driver().address_free(base_, mapped_.size() * chunk_bytes_);
}

void CudaSpace::require_state(uint32_t slot, bool mapped) const {
    if (slot >= mapped_.size()) throw UsageError(concat("slot ", slot, " lies outside the ", mapped_.size(), " slots"));
    if (mapped_[slot] != mapped)
        throw UsageError(concat("slot ", slot, mapped ? " holds no chunk" : " already holds a chunk"));
}

void CudaSpace::map(uint32_t slot, int fd) {
    require_state(slot, false);
    DeviceGuard guard(device_);
    CUmemGenericAllocationHandle handle = 0;
    check_driver(
        driver().mem_import(&handle, reinterpret_cast<void*>(intptr_t(fd)), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "cuMemImportFromShareableHandle: the descriptor is no chunk of GPU memory");
    const CUdeviceptr at = base_ + slot * chunk_bytes_;
    const CUresult mapped = driver().mem_map(at, chunk_bytes_, 0, handle, 0);
    driver().mem_release(handle);  // the mapping keeps the memory
    check_driver(mapped, "cuMemMap: the chunk's size differs from the agreed one");
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device_;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    const CUresult granted = driver().mem_set_access(at, chunk_bytes_, &access, 1);
    if (granted != CUDA_SUCCESS) {
        driver().mem_unmap(at, chunk_bytes_);
        check_driver(granted, "cuMemSetAccess: the devices have no peer access");
    }
    mapped_[slot] = true;
}

void CudaSpace::unmap(uint32_t slot) {
    require_state(slot, true);
    DeviceGuard guard(device_);
    check_driver(driver().mem_unmap(base_ + slot * chunk_bytes_, chunk_bytes_), "cuMemUnmap");
    mapped_[slot] = false;
}

uint32_t CudaSpace::mapped() const {
    return uint32_t(std::count(mapped_.begin(), mapped_.end(), true));
}

}  // namespace specgen

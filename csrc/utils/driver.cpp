#include "driver.hpp"

namespace specgen {
namespace {

template <typename Function>
void fetch(Function& entry, const char* name) {
    constexpr unsigned kVersion = 12000;
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess)
        throw SystemFailure(concat("the CUDA driver has no ", name, ": a driver of CUDA 12 or newer is needed"));
    entry = reinterpret_cast<Function>(address);
}

DriverApi load() {
    DriverApi api{};
    fetch(api.mem_create, "cuMemCreate");
    fetch(api.mem_release, "cuMemRelease");
    fetch(api.mem_export, "cuMemExportToShareableHandle");
    fetch(api.mem_import, "cuMemImportFromShareableHandle");
    fetch(api.address_reserve, "cuMemAddressReserve");
    fetch(api.address_free, "cuMemAddressFree");
    fetch(api.mem_map, "cuMemMap");
    fetch(api.mem_unmap, "cuMemUnmap");
    fetch(api.mem_set_access, "cuMemSetAccess");
    return api;
}

}  // namespace

const DriverApi& driver() {
    static const DriverApi api = load();
    return api;
}

}  // namespace specgen

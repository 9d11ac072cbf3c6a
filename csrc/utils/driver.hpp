// CUDA calls that throw, and the driver's entry points fetched at run time: the library loads on hosts without libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "error.hpp"

namespace specgen {

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw SystemFailure(concat(what, ": ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ")"));
}

inline void check_driver(CUresult status, const char* what) {
    if (status != CUDA_SUCCESS) throw SystemFailure(concat(what, ": CUDA driver error ", int(status)));
}

struct DriverApi {
    decltype(&cuMemCreate) mem_create;
    decltype(&cuMemRelease) mem_release;
    decltype(&cuMemExportToShareableHandle) mem_export;
    decltype(&cuMemImportFromShareableHandle) mem_import;
    decltype(&cuMemAddressReserve) address_reserve;
    decltype(&cuMemAddressFree) address_free;
    decltype(&cuMemMap) mem_map;
    decltype(&cuMemUnmap) mem_unmap;
    decltype(&cuMemSetAccess) mem_set_access;
};

// Throws SystemFailure naming the missing entry point, or that there is no driver.
const DriverApi& driver();

// Makes `device` current for this scope, and the caller's again afterwards.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
        check_cuda(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

}  // namespace specgen

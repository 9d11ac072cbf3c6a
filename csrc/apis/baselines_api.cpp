// What the benchmark compares with: the copy engine, contiguous and in batches.
#include <cuda_runtime_api.h>

#include "../copy/staging_ring.hpp"
#include "../utils/driver.hpp"
#include "arrays.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace specgen::apis {
namespace {

void copy_contiguous(uint64_t target, uint64_t source, uint64_t bytes, uint64_t stream) {
    check_cuda(cudaMemcpyAsync(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes,
                               cudaMemcpyDefault, reinterpret_cast<cudaStream_t>(stream)),
               "cudaMemcpyAsync");
}

void copy_batch(const Array<uint64_t>& targets, const Array<uint64_t>& sources, const Array<uint64_t>& sizes,
                uint64_t stream) {
    if (targets.size() != sources.size() || sources.size() != sizes.size()) {
        throw UsageError(concat(targets.size(), " targets, ", sources.size(), " sources, ", sizes.size(),
                                " sizes: the counts must agree"));
    }
    enqueue_engine_batch(targets.data(), sources.data(), sizes.data(), size_t(sizes.size()),
                         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void register_baselines(py::module_& module) {
    module.def("copy_contiguous", &copy_contiguous, py::arg("target"), py::arg("source"), py::arg("bytes"),
               py::arg("stream"));
    module.def("copy_batch", &copy_batch, py::arg("targets"), py::arg("sources"), py::arg("sizes"), py::arg("stream"));
}

}  // namespace specgen::apis

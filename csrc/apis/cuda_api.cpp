#include <pybind11/stl.h>

#include <chrono>
#include <thread>

#include "../copy/cuda_copier.hpp"
#include "../memory/cuda_space.hpp"
#include "../utils/driver.hpp"
#include "arrays.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace specgen::apis {
namespace {

int device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// The GIL guards the copier: it is dropped only between looks, which at first follow at once: a small copy is over in
// less time than a sleeping thread needs to wake up.
bool wait_for_copy(CudaCopier& copier, uint64_t ticket, int timeout_ms) {
    constexpr auto kImpatient = std::chrono::microseconds(100);
    const auto start = std::chrono::steady_clock::now();
    const auto end = start + std::chrono::milliseconds(timeout_ms);
    while (!copier.done(ticket)) {
        const auto now = std::chrono::steady_clock::now();
        if (now > end) return false;
        if (now - start < kImpatient) continue;
        py::gil_scoped_release release;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return true;
}

void register_cuda_memory(py::module_& module) {
    py::class_<CudaChunk>(module, "CudaChunk", "Physical memory on a lender's device.")
        .def(py::init<int, uint64_t>(), py::arg("device"), py::arg("bytes"))
        .def(
            "export_fd", [](const CudaChunk& self) { return self.export_fd().release(); },
            "A new descriptor; the caller closes it.")
        .def("release", &CudaChunk::release);
    py::class_<CudaSpace>(module, "CudaSpace", "Chunks of peer memory mapped side by side for one device.")
        .def(py::init<int, uint32_t, uint64_t>(), py::arg("device"), py::arg("slots"), py::arg("chunk_bytes"))
        .def("map", &CudaSpace::map, py::arg("slot"), py::arg("fd"))
        .def("unmap", &CudaSpace::unmap, py::arg("slot"))
        .def_property_readonly("base", &CudaSpace::base)
        .def_property_readonly("mapped", &CudaSpace::mapped)
        .def_property_readonly("device", &CudaSpace::device);
}

}  // namespace

void register_cuda(py::module_& module) {
    module.def("device_count", &device_count, "CUDA devices here; 0 without a driver.");
    register_cuda_memory(module);
    py::class_<DeviceTables>(module, "DeviceTables", "Device addresses of a prepared transfer's page tables.")
        .def(py::init<uint64_t, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>(), py::arg("device_pages"),
             py::arg("arena_pages"), py::arg("generations"), py::arg("flags"), py::arg("pages"),
             py::arg("index_stride") = 1);
    py::class_<CudaCopier>(module, "CudaCopier",
                           "Page copies on a stream of its own; large page-first ones through local staging memory.")
        .def(py::init([](PageLayout layout, uint64_t arena_base, int device, uint32_t sm_budget, double max_gbps,
                         uint32_t timeout_ms, uint64_t staging_bytes, uint32_t staging_engines) {
                 return std::make_unique<CudaCopier>(
                     std::move(layout), arena_base, device,
                     CopierOptions{sm_budget, max_gbps, timeout_ms, staging_engines, staging_bytes});
             }),
             py::arg("layout"), py::arg("arena_base"), py::arg("device"), py::arg("sm_budget") = 16,
             py::arg("max_gbps") = 0.0, py::arg("timeout_ms") = 10000, py::arg("staging_bytes") = 0,
             py::arg("staging_engines") = 2)
        .def(
            "submit",
            [](CudaCopier& self, Direction direction, const Array<int64_t>& device_pages,
               const Array<int64_t>& arena_pages, const Array<uint64_t>& generations, uint64_t after_stream,
               CopyPath path) {
                return self.submit(direction, {to_vector(device_pages), to_vector(arena_pages), to_vector(generations)},
                                   after_stream, path);
            },
            py::arg("direction"), py::arg("device_pages"), py::arg("arena_pages"), py::arg("generations"),
            py::arg("after_stream") = 0, py::arg_v("path", CopyPath::kAuto, "CopyPath.AUTO"))
        .def("path_for", &CudaCopier::path_for, py::arg("pages"), "What AUTO stands for with so many pages.")
        .def("done", &CudaCopier::done, py::arg("ticket"))
        .def("wait", &wait_for_copy, py::arg("ticket"), py::arg("timeout_ms"))
        .def(
            "take_flags", [](CudaCopier& self, uint64_t ticket) { return to_array(self.take_flags(ticket)); },
            py::arg("ticket"))
        .def("order_after", &CudaCopier::order_after, py::arg("ticket"), py::arg("stream"))
        .def("launch", &CudaCopier::launch, py::arg("direction"), py::arg("tables"), py::arg("config"),
             py::arg("stream"), py::arg("lane") = 1)
        .def("select", &CudaCopier::select, py::arg("direction"), py::arg("pages"))
        .def_property_readonly("stream", &CudaCopier::stream);
}

}  // namespace specgen::apis

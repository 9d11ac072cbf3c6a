#include "../memory/loopback_space.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace specgen::apis {

void register_memory(py::module_& module) {
    module.def(
        "create_loopback_chunk", [](uint64_t bytes) { return create_loopback_chunk(bytes).release(); },
        py::arg("bytes"), "Descriptor of sealed shared memory; the caller closes it.");
    py::class_<LoopbackSpace>(module, "LoopbackSpace", "Chunks of shared memory mapped side by side.")
        .def(py::init<uint32_t, uint64_t>(), py::arg("slots"), py::arg("chunk_bytes"))
        .def("map", &LoopbackSpace::map, py::arg("slot"), py::arg("fd"))
        .def("unmap", &LoopbackSpace::unmap, py::arg("slot"))
        .def_property_readonly("base", &LoopbackSpace::base)
        .def_property_readonly("mapped", &LoopbackSpace::mapped);
}

}  // namespace specgen::apis

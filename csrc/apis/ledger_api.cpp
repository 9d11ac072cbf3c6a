#include "../ledger/page_ledger.hpp"
#include "arrays.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace specgen::apis {

void register_ledger(py::module_& module) {
    py::class_<PageLedger>(module, "PageLedger", "Which arena pages are free, used, in flight or being revoked.")
        .def(py::init<uint32_t, uint32_t>(), py::arg("slots"), py::arg("pages_per_chunk"))
        .def("add_chunk", &PageLedger::add_chunk, py::arg("slot"))
        .def("revoke_chunk", &PageLedger::revoke_chunk, py::arg("slot"))
        .def("remove_chunk", &PageLedger::remove_chunk, py::arg("slot"))
        .def("copies_in", &PageLedger::copies_in, py::arg("slot"))
        .def("is_mapped", &PageLedger::is_mapped, py::arg("slot"))
        .def("pause_chunk", &PageLedger::pause_chunk, py::arg("slot"), py::arg("paused"))
        .def(
            "allocate", [](PageLedger& self, uint32_t count) { return to_array(self.allocate(count)); },
            py::arg("count"))
        .def(
            "generations",
            [](const PageLedger& self, const Array<int64_t>& pages) {
                std::vector<uint64_t> generations;
                for (int64_t page : to_vector(pages)) generations.push_back(self.generation(page));
                return to_array(generations);
            },
            py::arg("pages"))
        .def(
            "release",
            [](PageLedger& self, const Array<int64_t>& pages, const Array<uint64_t>& generations) {
                return self.release(to_vector(pages), to_vector(generations));
            },
            py::arg("pages"), py::arg("generations"))
        .def(
            "begin_copy",
            [](PageLedger& self, const Array<int64_t>& pages, const Array<uint64_t>& generations) {
                return to_array(self.begin_copy(to_vector(pages), to_vector(generations)));
            },
            py::arg("pages"), py::arg("generations"))
        .def(
            "end_copy", [](PageLedger& self, const Array<int64_t>& pages) { self.end_copy(to_vector(pages)); },
            py::arg("pages"))
        .def("counts",
             [](const PageLedger& self) {
                 const PageCounts c = self.counts();
                 return py::make_tuple(c.free, c.used, c.in_flight, c.revoking, c.total);
             })
        .def("check_integrity", &PageLedger::check_integrity);
}

}  // namespace specgen::apis

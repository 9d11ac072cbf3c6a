#include <pybind11/stl.h>

#include "../copy/copy_config.hpp"
#include "../copy/copy_path.hpp"
#include "../copy/loopback_copier.hpp"
#include "arrays.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace specgen::apis {

void register_copy(py::module_& module) {
    py::enum_<Direction>(module, "Direction").value("EXPORT", Direction::kExport).value("IMPORT", Direction::kImport);
    py::enum_<ArenaLayout>(module, "ArenaLayout")
        .value("LAYER_FIRST", ArenaLayout::kLayerFirst)
        .value("PAGE_FIRST", ArenaLayout::kPageFirst);
    py::enum_<CopyPath>(module, "CopyPath", "How bytes travel: see csrc/copy/copy_path.hpp.")
        .value("AUTO", CopyPath::kAuto)
        .value("DIRECT", CopyPath::kDirect)
        .value("ENGINE", CopyPath::kEngine)
        .value("STAGED", CopyPath::kStaged);
    module.attr("PAGE_MATCHES") = int(kPageMatches);
    module.attr("PAGE_STALE") = int(kPageStale);
    py::class_<Plane>(module, "Plane",
                      "A device buffer with one row a page: address, bytes from row to row, bytes that travel.")
        .def(py::init<uint64_t, uint64_t, uint64_t>(), py::arg("base"), py::arg("stride"), py::arg("bytes"))
        .def_readonly("base", &Plane::base)
        .def_readonly("stride", &Plane::stride)
        .def_readonly("bytes", &Plane::bytes);
    py::class_<PageLayout>(module, "PageLayout", "Where a page's bytes lie in an arena chunk.")
        .def_readonly("chunk_bytes", &PageLayout::chunk_bytes)
        .def_readonly("page_bytes", &PageLayout::page_bytes)
        .def_readonly("pages_per_chunk", &PageLayout::pages_per_chunk)
        .def_readonly("tag_offset", &PageLayout::tag_offset)
        .def_readonly("slot_bytes", &PageLayout::slot_bytes)
        .def_property_readonly("segments_per_page", [](const PageLayout& self) { return self.segments.size(); });
    module.def("pages_in_chunk", &pages_in_chunk, py::arg("chunk_bytes"), py::arg("page_bytes"));
    module.def("plan_page_layout", &plan_page_layout, py::arg("planes"), py::arg("layout"), py::arg("chunk_bytes"),
               py::arg("max_segment_bytes") = 8192,
               "Cut a page into segments. Raises UsageError naming the plane and the value.");
    module.def("select_planes", &select_planes, py::arg("layout"), py::arg("first"), py::arg("count"),
               "Some of a page's planes, where they lie in the whole page: for copies layer by layer. A part can't be "
               "selected from again.");
    py::class_<CopyConfig>(module, "CopyConfig", "The kernel and launch shape of a transfer.")
        .def(py::init<std::string, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, double>(), py::arg("method"),
             py::arg("sms"), py::arg("warps"), py::arg("stages"), py::arg("stage_bytes"), py::arg("tiles_per_warp") = 1,
             py::arg("max_gbps") = 0.0)
        .def_readonly("method", &CopyConfig::method)
        .def_readonly("sms", &CopyConfig::sms)
        .def_readonly("warps", &CopyConfig::warps)
        .def_readonly("stages", &CopyConfig::stages)
        .def_readonly("stage_bytes", &CopyConfig::stage_bytes)
        .def_readonly("tiles_per_warp", &CopyConfig::tiles_per_warp)
        .def_readonly("max_gbps", &CopyConfig::max_gbps)
        .def_property_readonly("shared_bytes", &CopyConfig::shared_bytes)
        .def("__repr__", &CopyConfig::to_string);
    module.def("select_copy_config", &select_copy_config, py::arg("slot_bytes"), py::arg("total_bytes"),
               py::arg("direction"), py::arg("sm_budget"));
    module.def("check_copy_config", &check_copy_config, py::arg("config"), py::arg("slot_bytes"));
    module.def(
        "plan_tiles",
        [](uint32_t pages, uint32_t segments_per_page, uint32_t workers, uint32_t per_worker) {
            const Tiling tiling = plan_tiles(pages, segments_per_page, workers, per_worker);
            std::vector<std::pair<uint32_t, uint32_t>> tiles;
            for (uint32_t i = 0; i < tiling.tiles; ++i) tiles.emplace_back(tiling.tile(i).begin, tiling.tile(i).end);
            return tiles;
        },
        py::arg("pages"), py::arg("segments_per_page"), py::arg("workers"), py::arg("per_worker"),
        "(first, end) of each tile's segments, as the kernels cut a transfer.");
    module.def(
        "plan_staging",
        [](const Array<int64_t>& arena_pages, uint32_t pages_per_chunk, uint32_t piece_pages, uint32_t most_runs) {
            const StagingPlan plan = plan_staging(to_vector(arena_pages), pages_per_chunk, piece_pages, most_runs);
            std::vector<std::pair<uint32_t, uint32_t>> runs;
            for (const Run& run : plan.runs) runs.emplace_back(run.first, run.pages);
            return py::make_tuple(to_array(plan.order), runs, plan.packed);
        },
        py::arg("arena_pages"), py::arg("pages_per_chunk"), py::arg("piece_pages"), py::arg("most_runs"),
        "(order, (first, pages) of each run, pages packed): which pages the copy engine carries.");
    module.def("select_copy_path", &select_copy_path, py::arg("total_bytes"), py::arg("pieces_fit"), py::arg("paced"));
    py::class_<LoopbackCopier>(module, "LoopbackCopier",
                               "Page copies in host memory, in order, on a thread of its own.")
        .def(py::init<PageLayout, uint64_t, uint32_t>(), py::arg("layout"), py::arg("arena_base"),
             py::arg("page_delay_us") = 0)
        .def(
            "submit",
            [](LoopbackCopier& self, Direction direction, const Array<int64_t>& device_pages,
               const Array<int64_t>& arena_pages, const Array<uint64_t>& generations, uint64_t) {
                return self.submit(direction,
                                   {to_vector(device_pages), to_vector(arena_pages), to_vector(generations)});
            },
            py::arg("direction"), py::arg("device_pages"), py::arg("arena_pages"), py::arg("generations"),
            py::arg("after_stream") = 0)
        .def("done", &LoopbackCopier::done, py::arg("ticket"))
        .def("wait", &LoopbackCopier::wait, py::arg("ticket"), py::arg("timeout_ms"),
             py::call_guard<py::gil_scoped_release>())
        .def(
            "take_flags", [](LoopbackCopier& self, uint64_t ticket) { return to_array(self.take_flags(ticket)); },
            py::arg("ticket"));
}

}  // namespace specgen::apis

#include "apis/register.hpp"

PYBIND11_MODULE(_kv, module) {
    using namespace specgen::apis;
    module.doc() =
        "KV transport: channels, page bookkeeping, shared memory and page copies. The Python face is "
        "specgen_engine.kv.";
    register_errors(module);
    register_channel(module);
    register_ledger(module);
    register_memory(module);
    register_copy(module);
#ifdef SPECGEN_WITH_CUDA
    register_cuda(module);
    register_baselines(module);
    module.attr("HAS_CUDA") = true;
#else
    module.attr("HAS_CUDA") = false;
#endif
}

"""SGLang's batch-invariant operators for GLM-5, so that a comparison is of forks and not of batch sizes.

--enable-deterministic-inference refuses the dsa backend. Its sparse attention computes each token apart, in prefill and
decoding by the same kernel; matrix products, the router and the experts' sums are what batches of other sizes compute
otherwise, and those SGLang has operators for.
"""

from __future__ import annotations

import os

SWITCH = "SPECGEN_BATCH_INVARIANT"
# DeepGEMM's product is compiled anew for many shapes; Triton's once a type.
ENVIRONMENT = {SWITCH: "1", "SGLANG_BATCH_INVARIANT_OPS_ENABLE_MM_DEEPGEMM": "0"}


def enable_if_asked() -> None:
    """In a scheduler, before its model's weights are made: what SGLang decides after that, it decides as if
    --enable-deterministic-inference were set. Nothing without SPECGEN_BATCH_INVARIANT=1."""
    if os.environ.get(SWITCH) != "1":
        return
    from sglang.srt.runtime_context import get_context

    get_context().override("specgen", enable_deterministic_inference=True)

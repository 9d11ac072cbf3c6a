"""Real load_inline builds by the builder: a quick candidate is judged beside them, and their libraries are used."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from specgen_engine.evaluation.base import Candidate, Stage, Status
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.pools.builds import build_kind
from specgen_engine.pools.local import LocalPool
from tests.pools.burst import TASK
from tests.pools.test_builds import QUICK

LIMITS = EvaluationLimits(compile_s=300.0, timing_budget_s=0.1, precision=1.0, check_seeds=1)
INLINE = """
import torch
from torch.utils.cpp_extension import load_inline
LIBRARY = load_inline(name="library{number}", {sources}, functions=["twice"])
class ModelNew(torch.nn.Module):
    def forward(self, x):
        return LIBRARY.twice(x)
"""
CPP = 'cpp_sources="torch::Tensor twice(torch::Tensor x) { return x * 2.0 + 1.0; }"'
CUDA = '''cpp_sources="torch::Tensor twice(torch::Tensor x);", cuda_sources=r"""
#include <torch/extension.h>
__global__ void twice_kernel(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] * 2.0f + 1.0f;
}
torch::Tensor twice(torch::Tensor x) {
    auto y = torch::empty_like(x);
    int n = x.numel();
    twice_kernel<<<(n + 255) / 256, 256>>>(x.data_ptr<float>(), y.data_ptr<float>(), n);
    return y;
}
"""'''


@pytest.mark.parametrize(
    ("device", "sources", "kind"),
    [
        ("cpu", CPP, "cpp_inline"),
        pytest.param("cuda:0", CUDA, "cuda_inline", marks=pytest.mark.gpu(count=1)),
    ],
)
def test_a_quick_candidate_is_judged_while_a_library_is_built(
    device: str, sources: str, kind: str, tmp_path: Path
) -> None:
    long = Candidate(INLINE.format(number=1, sources=sources))
    assert build_kind(long) == kind

    async def session() -> None:
        pool = LocalPool(workers=1, device=device, limits=LIMITS, cache=tmp_path, build_slots=1)
        await pool.start()
        try:
            assert await pool.check_task(TASK) is None
            built = pool.submit(TASK, long, search="long")
            async for stage in built.events():
                if stage is Stage.COMPILE:
                    break
            start = time.monotonic()
            quick = await pool.submit(TASK, Candidate(QUICK.format(0)), search="quick").verdict()
            quick_s = time.monotonic() - start
            assert quick.status is Status.CORRECT, quick.reason
            assert built.build_began is not None
            verdict = await built.verdict()
            assert verdict.status is Status.CORRECT, (verdict.reason, verdict.digest)
            at_worker_s = verdict.stages["compile"] - built.built_s
            print(f"{device}: quick {quick_s:.2f} s; build {built.built_s:.1f} s, then {at_worker_s:.2f} s to import")
            assert at_worker_s < built.built_s / 2
        finally:
            await pool.close()

    asyncio.run(session())

"""Peaks, the floor and the shares: arithmetic that a verdict hangs on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specgen_engine.evaluation.base import Candidate, Status, Task, Verdict
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.evaluation.profile.base import Bound
from specgen_engine.evaluation.profile.device import device_facts
from specgen_engine.evaluation.profile.occupancy import theoretical
from specgen_engine.evaluation.profile.roofline import (
    TIMER_NS,
    DeviceFacts,
    Peaks,
    Work,
    achieved,
    below_floor,
    classify,
    floor_ms,
    ideal_ms,
    peaks_of,
)
from specgen_engine.evaluation.profile.work import needed_bytes, work_of

from .conftest import PoolThread

H100 = DeviceFacts("NVIDIA H100 80GB HBM3", 50 << 20, 3.35e12, 66.9e12, 132)
MB = 1_000_000


def test_the_larger_of_data_sheet_and_device_is_the_peak_so_that_no_floor_is_too_high() -> None:
    assert peaks_of(H100).memory_bytes_per_s == 3.352e12
    assert peaks_of(H100._replace(memory_bytes_per_s=3.9e12)).memory_bytes_per_s == 3.9e12
    assert peaks_of(H100).flops["bf16_tensor"] == pytest.approx(989.4e12)
    assert peaks_of(H100, memory_gbs=100.0) == Peaks(100e9, peaks_of(H100).flops, 50 << 20, "operator")


def test_an_unknown_device_gives_its_own_bandwidth_or_no_floor_at_all() -> None:
    other = DeviceFacts("Some GPU", 4 << 20, 0.5e12, 10e12)
    assert peaks_of(other) == Peaks(0.5e12, {"fp32": 10e12}, 4 << 20, "device properties")
    silent = peaks_of(DeviceFacts("cpu", 32 << 20))
    assert (silent.source, floor_ms(Work(MB, MB, MB), silent), ideal_ms(Work(MB, MB, MB), silent)) == (
        "unknown",
        0,
        None,
    )


def test_the_floor_counts_needed_inputs_whole_and_outputs_beyond_the_cache() -> None:
    peaks = Peaks(1e12, {}, 10 * MB, "test")
    slack = TIMER_NS / 1e6
    assert floor_ms(Work(110 * MB, 5 * MB, 110 * MB), peaks) == pytest.approx(0.1 - slack)
    assert floor_ms(Work(110 * MB, 65 * MB, 110 * MB), peaks) == pytest.approx(0.15 - slack)
    assert floor_ms(Work(110 * MB, 5 * MB, 0), peaks) == 0  # an embedding: nothing is known to be read
    assert floor_ms(Work(4 * MB, 5 * MB, 4 * MB), peaks, cold=False) == 0  # all of it may still be in the cache


def test_a_time_below_the_floor_is_explained_and_one_above_it_is_not() -> None:
    peaks = peaks_of(H100)
    work = Work(512 * MB, 512 * MB, 512 * MB)
    assert below_floor(0.40, work, peaks) == ""
    reason = below_floor(0.02, work, peaks)
    assert "0.0200 ms" in reason
    assert "512.0 MB must be read" in reason
    assert "3352 GB/s (data sheet)" in reason


def test_shares_of_the_peaks_add_up_over_kinds_of_arithmetic() -> None:
    peaks = Peaks(1e12, {"fp32": 1e12, "bf16_tensor": 10e12}, 0, "test")
    found = achieved(1.0, 0.5e12, {"fp32": 0.1e12, "bf16_tensor": 5e12}, peaks, "ncu")
    assert found.memory == 0.5
    assert found.compute == pytest.approx(0.6)
    assert found.flop_type == "bf16_tensor"
    assert achieved(1.0, None, {"fp8_tensor": 1e12}, peaks, "ncu").compute is None  # a peak that is not known


@pytest.mark.parametrize(
    ("memory", "compute", "bound"),
    [(0.9, 0.2, Bound.MEMORY), (0.3, 0.7, Bound.COMPUTE), (0.3, 0.59, Bound.LATENCY), (None, None, Bound.UNKNOWN),
     (0.8, None, Bound.MEMORY)],
)  # fmt: skip
def test_a_bound_is_the_busier_side_or_latency(memory: float | None, compute: float | None, bound: Bound) -> None:
    assert classify(memory, compute) is bound


def test_occupancy_as_the_guide_computes_it() -> None:
    assert theoretical(256, 32, 0).share == 1.0
    assert theoretical(256, 128, 0) == (0.25, "registers")
    assert theoretical(128, 32, 100_000) == (8 / 64, "shared memory")
    assert theoretical(32, 16, 0) == (0.5, "blocks")
    with pytest.raises(ValueError, match="shared memory"):
        theoretical(128, 32, 300_000)


def test_only_inputs_that_the_reference_reads_throughout_are_needed() -> None:
    table, rows, scale = torch.randn(4096, 256), torch.arange(8), torch.randn(1, 256)

    def lookup(table: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return table[rows] * scale

    assert needed_bytes(lookup, [table, rows, scale], lookup(table, rows, scale)) == 0
    big = torch.randn(1024, 512)
    assert needed_bytes(lambda x: x.relu(), [big], big.relu()) == big.nbytes
    half = lambda x: x[:512] * 2  # noqa: E731
    assert needed_bytes(half, [big], half(big)) == 0


def test_work_counts_storage_and_products() -> None:
    left, right = torch.randn(64, 32), torch.randn(32, 16)
    wide = torch.randn(1, 8).expand(1000, 8)
    work = work_of(lambda a, b, c: a @ b, [left, right, wide], left @ right, False, needed=False, flops=True)
    assert work == Work(
        left.nbytes + right.nbytes + 32, 64 * 16 * 4, left.nbytes + right.nbytes + 32, 65536, "tf32_tensor"
    )
    assert work_of(lambda a: a, [left], left, True, needed=False, flops=False).output_bytes == 0


COLUMNS = device_facts("cpu").l2_bytes * 3 // 4 // 4096
"""Inputs and outputs together are half as large again as the last-level cache."""
BIG = Task(
    f"""
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return x * 2
def get_inputs():
    return [torch.rand(1024, 1).repeat(1, {COLUMNS})]
def get_init_inputs():
    return []
""",
    "double",
)
TWICE = """
import torch
class ModelNew(torch.nn.Module):
    def forward(self, x):
        return x + x
"""


def test_a_figure_below_the_floor_is_a_rejection_and_one_above_gets_its_share(tmp_path: Path) -> None:
    """The operator's word makes the floor on a CPU: half a cache at 1 MB/s; at 10 TB/s."""
    statuses = []
    for gbs in (1e-3, 1e4):
        limits = EvaluationLimits(check_s=5, timing_budget_s=0.1, peak_memory_gbs=gbs)
        thread = PoolThread(tmp_path, limits)
        try:
            statuses.append(thread.call(_submit(thread, Candidate(TWICE))))
        finally:
            thread.close()
    slow, fast = statuses
    assert slow.status is Status.REJECTED, slow
    assert "below the roofline floor" in slow.reason
    assert fast.status is Status.CORRECT, fast
    assert fast.roofline is not None
    assert 0 < fast.roofline < 1


async def _submit(thread: PoolThread, candidate: Candidate) -> Verdict:
    return await thread.pool.submit(BIG, candidate, search="test").verdict()

"""Nsight Compute: its command lines, its CSV, and what its figures mean. No process is started here.

Options and metric names: Nsight Compute CLI and Kernel Profiling Guide, 2025.3.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .base import Bound, Kernel, Metric, ProfileError
from .launches import MAX_KERNELS, NAME_CHARS

MAX_LAUNCHES = 64
TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
SM_BUSY = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY_BUSY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM_BUSY = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR_BUSY = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
WARPS_ACTIVE = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS, SHARED = "launch__registers_per_thread", "launch__shared_mem_per_block"
_SASS = "smsp__sass_thread_inst_executed_op_{}_pred_on.sum"
FLOP_METRICS: dict[str, tuple[str, int]] = {
    _SASS.format(f"{letter}{op}"): (kind, 2 if op == "fma" else 1)
    for letter, kind in (("f", "fp32"), ("h", "fp16"), ("d", "fp64"))
    for op in ("add", "mul", "fma")
}
"""metric: (arithmetic, operations an instruction of a thread). Packed half instructions count as the tool counts."""
TENSOR_PATHS = {
    "bf16_dst_fp32": "bf16_tensor", "fp16": "fp16_tensor", "fp16_dst_fp16": "fp16_tensor",
    "fp16_dst_fp32": "fp16_tensor", "tf32_dst_fp32": "tf32_tensor", "fp8": "fp8_tensor", "fp8_dst_fp16": "fp8_tensor",
    "fp8_dst_fp32": "fp8_tensor", "fp64": "fp64_tensor", "int8": "int8_tensor",
}  # fmt: skip
TENSOR_PREFIX = "sm__ops_path_tensor_src_"
LIGHT = ("LaunchStats", "Occupancy")
LIGHT_METRICS = (TIME, READ, WRITTEN, SM_BUSY, MEMORY_BUSY, DRAM_BUSY, TENSOR_BUSY, WARPS_ACTIVE, *FLOP_METRICS)
STALLS = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
LOADS, LOAD_REQUESTS = (f"l1tex__t_{what}_pipe_lsu_mem_global_op_ld.sum" for what in ("sectors", "requests"))
STORES, STORE_REQUESTS = (f"l1tex__t_{what}_pipe_lsu_mem_global_op_st.sum" for what in ("sectors", "requests"))
SPILL_LOADS, SPILL_STORES = (f"smsp__sass_inst_executed_op_local_{what}.sum" for what in ("ld", "st"))
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
_ACCESS = (LOADS, LOAD_REQUESTS, STORES, STORE_REQUESTS, SPILL_LOADS, SPILL_STORES, CONFLICTS, WAVEFRONTS)
DEEP: dict[Bound, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Bound.MEMORY: (("MemoryWorkloadAnalysis", "WarpStateStats"), _ACCESS),
    Bound.COMPUTE: (("ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats"), (CONFLICTS, WAVEFRONTS)),
    Bound.LATENCY: (("SchedulerStats", "WarpStateStats"), _ACCESS),
    Bound.UNKNOWN: (("WarpStateStats",), _ACCESS),
}
"""Sections and single metrics of the second pass, by what the first one found."""
_MISSING = re.compile(r"==(?:ERROR|WARNING)== .*?metric '?\"?([\w:.]+)", re.IGNORECASE)


def find_ncu() -> str:
    """The program. Raises ProfileError where it is not installed."""
    found = shutil.which("ncu")
    if found:
        return found
    places = [Path("/usr/local/cuda/bin/ncu"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)]
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    raise ProfileError("ncu: not installed (no ncu on PATH); install Nsight Compute for hardware counters")


class Request(NamedTuple):
    """One run of ncu. kernel: only this one, by its function's name, once."""

    sections: tuple[str, ...]
    metrics: tuple[str, ...]
    kernel: str = ""


def light_request(tensor_metrics: Iterable[str]) -> Request:
    return Request(LIGHT, (*LIGHT_METRICS, *tensor_metrics))


def deep_request(bound: Bound, kernel: str) -> Request:
    sections, metrics = DEEP[bound]
    return Request(sections, metrics, kernel)


def command(ncu: str, request: Request, log: Path, driver: Sequence[str]) -> list[str]:
    """Clocks are left alone: locking them is the machine owner's business, and often forbidden."""
    line = [ncu, "--clock-control", "none", "--target-processes", "application-only", "--profile-from-start", "off"]
    line += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    line += ["--kernel-name-base", "function", "--print-kernel-base", "function"]
    for section in request.sections:
        line += ["--section", section]
    line += ["--metrics", ",".join(request.metrics)]
    if request.kernel:
        line += ["--kernel-name", request.kernel, "--launch-count", "1"]
    else:
        line += ["--launch-count", str(MAX_LAUNCHES)]
    return [*line, *driver]


def query_command(ncu: str) -> list[str]:
    return [ncu, "--query-metrics"]


def tensor_metrics(listed: str) -> tuple[str, ...]:
    """Of the metrics that a device has (--query-metrics' text): those that count tensor core operations by type.

    A total and its parts are both listed; only the total is taken.
    """
    names = {line.split()[0] for line in listed.splitlines() if line.startswith(TENSOR_PREFIX)}
    paths = [path for path in TENSOR_PATHS if TENSOR_PREFIX + path in names]
    totals = [path for path in paths if not any(path.startswith(f"{other}_") for other in paths)]
    return tuple(f"{TENSOR_PREFIX}{path}.sum" for path in totals)


class Reading(NamedTuple):
    """One launch: its kernel's function name and its figures by metric name."""

    kernel: str
    figures: dict[str, Metric]

    def value(self, name: str) -> float | None:
        metric = self.figures.get(name)
        return None if metric is None else metric.value


def parse(log: str) -> list[Reading]:
    """The raw page: a row of names, a row of units, a row a launch; other lines are the tool's own talk.

    Raises ProfileError with the tool's first error when there is no launch in it.
    """
    start = log.find('"ID",')
    rows = list(csv.reader(io.StringIO(log[start:]))) if start >= 0 else []
    rows = [row for row in rows if row and not row[0].startswith("==")]
    if len(rows) < 3 or "Kernel Name" not in rows[0]:
        raise ProfileError(complaint(log))
    names, units = rows[0], rows[1]
    kernel_at = names.index("Kernel Name")
    readings = []
    for row in rows[2:]:
        if len(row) != len(names):
            continue
        figures = {}
        for name, unit, text in zip(names, units, row, strict=True):
            value = _number(text)
            if value is not None and "__" in name:
                figures[name] = Metric(name, value, unit)
        readings.append(Reading(row[kernel_at].strip()[:NAME_CHARS], figures | _dimensions(names, row)))
    if not readings:
        raise ProfileError(complaint(log))
    return readings


def complaint(log: str) -> str:
    """One line for what a run without figures said."""
    if "ERR_NVGPUCTRPERM" in log:
        return (
            "ncu: no permission to read GPU performance counters (ERR_NVGPUCTRPERM); run as root or let the driver"
            " allow users (NVreg_RestrictProfilingToAdminUsers=0)"
        )
    if "No kernels were profiled" in log:
        return "ncu: the call launched no kernel"
    errors = [line.removeprefix("==ERROR==").strip() for line in log.splitlines() if line.startswith("==ERROR==")]
    return f"ncu: {errors[0][:200]}" if errors else "ncu: it ended without figures"


def says_why(log: str, asked: Request) -> bool:
    """Figures, or a reason that another sandbox would not change."""
    return '"ID",' in log or "ERR_NVGPUCTRPERM" in log or bool(unknown_metrics(log, asked.metrics))


def unknown_metrics(log: str, asked: Iterable[str]) -> frozenset[str]:
    """Of the metrics asked for, those that this ncu says it can't find on this device."""
    named = {found.split(".")[0] for found in _MISSING.findall(log)}
    return frozenset(name for name in asked if name.split(".")[0] in named)


class Light(NamedTuple):
    """What the first pass says of the whole call. sm, memory: busy shares weighted by time, 0 to 1."""

    call_ns: float
    kernels: tuple[Kernel, ...]
    longest: str
    bytes: float | None
    flops: dict[str, float]
    sm: float | None
    memory: float | None


def light_of(readings: Sequence[Reading]) -> Light:
    """Raises ProfileError when the launches have no times."""
    times = [reading.value(TIME) or 0.0 for reading in readings]
    total = sum(times)
    if total <= 0:
        raise ProfileError("ncu: no kernel times in its output")
    groups: dict[str, list[Reading]] = {}
    for reading in readings:
        groups.setdefault(reading.kernel, []).append(reading)
    kernels = sorted((_kernel(name, group) for name, group in groups.items()), key=lambda kernel: -kernel.time_ns)
    flops: dict[str, float] = {}
    for reading in readings:
        for kind, count in _flops(reading).items():
            flops[kind] = flops.get(kind, 0.0) + count
    moved = [reading.value(name) for reading in readings for name in (READ, WRITTEN)]
    return Light(
        total,
        tuple(kernels[:MAX_KERNELS]),
        kernels[0].name,
        None if None in moved else float(sum(value or 0.0 for value in moved)),
        flops,
        _weighted(readings, times, SM_BUSY),
        _weighted(readings, times, MEMORY_BUSY),
    )


def longest_reading(readings: Sequence[Reading], kernel: str) -> Reading:
    mine = [reading for reading in readings if reading.kernel == kernel]
    return max(mine or readings, key=lambda reading: reading.value(TIME) or 0.0)


def stalls(figures: Mapping[str, Metric]) -> list[tuple[str, float]]:
    """(reason, warps that waited for it an issued instruction), worst first."""
    found = [(match[1], metric.value) for name, metric in figures.items() if (match := STALLS.fullmatch(name))]
    return sorted(found, key=lambda pair: -pair[1])


def _kernel(name: str, group: Sequence[Reading]) -> Kernel:
    longest = max(group, key=lambda reading: reading.value(TIME) or 0.0)
    registers, shared, warps = (longest.value(metric) for metric in (REGISTERS, SHARED, WARPS_ACTIVE))
    dims = []
    for what in ("grid", "block"):
        parts = [longest.value(f"launch__{what}_dim_{axis}") for axis in "xyz"]
        dims.append(None if None in parts else (int(parts[0] or 0), int(parts[1] or 0), int(parts[2] or 0)))
    return Kernel(
        name,
        len(group),
        sum(reading.value(TIME) or 0.0 for reading in group),
        dims[0],
        dims[1],
        None if registers is None else int(registers),
        None if shared is None else int(shared),
        None if warps is None else round(warps / 100, 4),
    )


def _flops(reading: Reading) -> dict[str, float]:
    counts: dict[str, float] = {}
    for name, (kind, each) in FLOP_METRICS.items():
        counts[kind] = counts.get(kind, 0.0) + each * (reading.value(name) or 0.0)
    for path, kind in TENSOR_PATHS.items():
        counts[kind] = counts.get(kind, 0.0) + (reading.value(f"{TENSOR_PREFIX}{path}.sum") or 0.0)
    return {kind: count for kind, count in counts.items() if count}


def _weighted(readings: Sequence[Reading], times: Sequence[float], name: str) -> float | None:
    pairs = [(reading.value(name), time) for reading, time in zip(readings, times, strict=True)]
    known = [(value, time) for value, time in pairs if value is not None]
    weight = sum(time for _, time in known)
    return sum(value * time for value, time in known) / weight / 100 if weight else None


def _dimensions(names: Sequence[str], row: Sequence[str]) -> dict[str, Metric]:
    """Grid and block from their columns, "(128, 1, 1)", in ncu versions without launch__*_dim_* metrics."""
    found = {}
    for column, what in (("Grid Size", "grid"), ("Block Size", "block")):
        parts = re.findall(r"\d+", row[names.index(column)]) if column in names else []
        if len(parts) == 3:
            for axis, part in zip("xyz", parts, strict=True):
                name = f"launch__{what}_dim_{axis}"
                found[name] = Metric(name, float(part), "")
    return found


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None

"""What profilers print, and what it comes to. Texts and files here are made in the tools' documented forms."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from specgen_engine.evaluation.profile import ncu, nsys, summary
from specgen_engine.evaluation.profile.base import Bound, Kernel, Limit, Metric, Profile, ProfileError, Roofline, Tool
from specgen_engine.evaluation.profile.launches import MAX_KERNELS, Launch, call_of, parse_call, plain_call
from specgen_engine.evaluation.profile.roofline import Peaks, Work, achieved, classify
from specgen_engine.evaluation.profile.torch_profiler import MARK, calls_in

PEAKS = Peaks(1e12, {"fp32": 50e12, "bf16_tensor": 900e12}, 50 << 20, "test")
STALL = "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
WAIT = "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"


def raw_page(*launches: dict[str, Any]) -> str:
    """The raw page as CSV: names, units, a row a launch; the tool's own lines around it."""
    names = ["ID", "Kernel Name", "Block Size", "Grid Size", *dict.fromkeys(key for row in launches for key in row)]
    names = list(dict.fromkeys(names))
    units = {ncu.TIME: "ns", ncu.READ: "byte", ncu.WRITTEN: "byte"}
    lines = [names, [units.get(name, "%" if "pct" in name else "") for name in names]]
    lines += [[str(number), *(str(row.get(name, "")) for name in names[1:])] for number, row in enumerate(launches)]
    table = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 7\n==PROF== Disconnected from process 7\n{table}\n"


def launch(name: str, time_ns: float, memory: float, sm: float, **more: Any) -> dict[str, Any]:
    common = {"Kernel Name": name, "Block Size": "(256, 1, 1)", "Grid Size": "(132, 2, 1)"}
    figures = {ncu.TIME: f"{time_ns:,.0f}", ncu.READ: "60,000,000", ncu.WRITTEN: "20000000"}
    busy = {ncu.MEMORY_BUSY: memory, ncu.SM_BUSY: sm, ncu.WARPS_ACTIVE: 80, ncu.REGISTERS: 32, ncu.SHARED: 1024}
    return common | figures | busy | more


def test_a_raw_page_is_read_launch_by_launch_with_units() -> None:
    first, second = ncu.parse(raw_page(launch("rms", 100_000, 91.5, 20), launch("tail", 2_000, 5, 1)))
    assert first.kernel == "rms"
    assert first.figures[ncu.TIME] == Metric(ncu.TIME, 100_000, "ns")
    assert first.value(ncu.MEMORY_BUSY) == 91.5
    assert second.value("launch__grid_dim_y") == 2
    assert "Kernel Name" not in second.figures


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "no permission"),
        ("==WARNING== No kernels were profiled.\n", "launched no kernel"),
        ("==ERROR== The application returned an error code (11).\n", "returned an error code"),
        ("", "ended without figures"),
        ('"ID","Kernel Name"\n"",""\n', "ended without figures"),
    ],
)
def test_a_run_without_figures_is_one_line_that_says_why(log: str, said: str) -> None:
    with pytest.raises(ProfileError, match=said) as caught:
        ncu.parse(log)
    assert "\n" not in str(caught.value)


def test_metrics_that_this_ncu_does_not_know_are_found_in_its_complaint() -> None:
    log = "==ERROR== Failed to find metric sm__ops_path_tensor_src_fp8.sum\n"
    asked = ("sm__ops_path_tensor_src_fp8.sum", ncu.TIME)
    assert ncu.unknown_metrics(log, asked) == {"sm__ops_path_tensor_src_fp8.sum"}
    assert ncu.unknown_metrics("==ERROR== something else", asked) == frozenset()


def test_tensor_operations_are_counted_once_where_totals_and_parts_are_listed() -> None:
    base = "sm__ops_path_tensor_src_"
    listed = "\n".join(
        f"{base}{name}   Counter   # of ops"
        for name in ("bf16_dst_fp32", "bf16_dst_fp32_sparsity_off", "fp16", "fp16_dst_fp32", "fp8_dst_fp32", "int4")
    )
    assert ncu.tensor_metrics(listed) == (
        f"{base}bf16_dst_fp32.sum", f"{base}fp16.sum", f"{base}fp8_dst_fp32.sum",
    )  # fmt: skip


def test_clocks_are_left_alone_and_only_the_marked_call_of_the_program_is_profiled() -> None:
    line = ncu.command("ncu", ncu.light_request(()), Path("log"), ["python", "driver"])
    assert line[line.index("--clock-control") + 1] == "none"
    assert line[line.index("--profile-from-start") + 1] == "off"
    assert line[-2:] == ["python", "driver"]
    deep = ncu.command("ncu", ncu.deep_request(Bound.MEMORY, "rms"), Path("log"), ["python"])
    assert "MemoryWorkloadAnalysis" in deep
    assert deep[deep.index("--kernel-name") + 1] == "rms"
    assert "ComputeWorkloadAnalysis" not in deep


def test_the_light_pass_weighs_kernels_by_time_and_counts_operations() -> None:
    fma = "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum"
    tensor = "sm__ops_path_tensor_src_bf16_dst_fp32.sum"
    page = raw_page(
        launch("gemm", 90_000, 30, 90, **{fma: 1000, tensor: 4e9}), launch("copy", 10_000, 95, 5, **{fma: 0, tensor: 0})
    )
    light = ncu.light_of(ncu.parse(page))
    assert light.longest == "gemm"
    assert light.sm == pytest.approx(0.815)
    assert light.bytes == 160e6
    assert light.flops == {"fp32": 2000, "bf16_tensor": 4e9}
    assert classify(light.memory, light.sm) is Bound.COMPUTE
    assert light.kernels[0] == Kernel("gemm", 1, 90_000, (132, 2, 1), (256, 1, 1), 32, 1024, 0.8)


def profile_of(page: str, work: Work) -> Profile:
    """As profile/stage.py puts one together."""
    readings = ncu.parse(page)
    light = ncu.light_of(readings)
    figures = readings[0].figures
    roofline = achieved(light.call_ns / 1e9, light.bytes, light.flops, PEAKS, "ncu")
    found = Profile(
        Tool.NCU, device="NVIDIA H100", sandbox="landlock (files)", bound=classify(light.memory, light.sm),
        call_ns=light.call_ns, kernels=light.kernels, metrics=tuple(figures.values()), roofline=roofline,
    )  # fmt: skip
    limits = summary.limits_of(summary.limits_from_counters(found, figures, PEAKS, work))
    return Profile(**{name: getattr(found, name) for name in found.__slots__} | {"limits": limits})


def test_the_limits_name_what_the_counters_show() -> None:
    uncoalesced = {
        ncu.LOADS: 3200,
        ncu.LOAD_REQUESTS: 100,
        STALL: 30,
        WAIT: 2,
        "smsp__issue_active.avg.per_cycle_active": 0.1,
    }
    found = profile_of(raw_page(launch("rms", 100_000, 91, 10, **uncoalesced)), Work(20_000_000, 5_000_000, 0))
    titles = {limit.title for limit in found.limits}
    assert titles == {
        "near the peak of memory bandwidth",
        "warps stall on long_scoreboard",
        "more memory traffic than the task needs",
    }  # fmt: skip
    assert [limit.share for limit in found.limits] == sorted((limit.share for limit in found.limits), reverse=True)
    small = {ncu.READ: 16, ncu.WRITTEN: 8, "launch__waves_per_multiprocessor": 0.05}
    few = profile_of(raw_page(launch("one", 9_000, 3, 4, **small)), Work(8, 8, 8))
    assert few.bound is Bound.LATENCY
    assert few.limits[0].title == "the grid does not fill the device"


def test_fifteen_lines_at_most_and_the_same_profile_after_json() -> None:
    page = raw_page(*(launch(f"kernel_{n}", 1e5 - n, 91, 10, **{STALL: 20, WAIT: 1}) for n in range(6)))
    found = profile_of(page, Work(20_000_000, 5_000_000, 0)).with_reason("ncu: no permission" * 30)
    text = summary.profile_text(found)
    assert len(text.splitlines()) == summary.LINES == 15
    assert max(map(len, text.splitlines())) <= summary.LINE_CHARS
    assert "bound by memory" in text
    assert "limit 1" in text
    assert "metrics: SM busy 10%, memory busy 91%" in text
    assert Profile.from_dict(found.to_dict()) == found
    assert summary.profile_text(Profile(Tool.NONE, reason="no tool")) == "profile: none (no tool)"


# -- single launches ---------------------------------------------------------------------------------------------------


def test_overlapping_launches_are_busy_once_and_gaps_are_seen() -> None:
    call = call_of([Launch("a", 0, 100), Launch("b", 50, 150), Launch("a", 300, 350)])
    assert (call.span_ns, call.busy_ns) == (350, 200)
    assert [(kernel.name, kernel.launches, kernel.time_ns) for kernel in call.kernels] == [("a", 2, 150), ("b", 1, 100)]
    with pytest.raises(ProfileError, match="no kernel"):
        call_of([])


def test_time_outside_kernels_is_the_first_limit_of_a_candidate_that_launches_slowly() -> None:
    call = call_of([Launch("a", 0, 1000, (1, 1, 1), (32, 1, 1), 16, 0, 0.5), Launch("b", 4000, 4500)])
    found = summary.limits_of(summary.limits_from_launches(Profile(Tool.CUPTI, kernels=call.kernels), call, 10_000))
    assert found[0].title == "time outside kernels"
    assert found[0].share == pytest.approx(0.85)


def test_a_process_of_foreign_code_can_only_send_figures() -> None:
    call = call_of([Launch(f"k{n}", n, n + 1, (1, 1, 1), (32, 1, 1), 16, 0, 0.5) for n in range(40)])
    message = plain_call(Tool.CUPTI, call, [Metric("x", 1.0, "ns")])
    read, metrics = parse_call(message)
    assert read == call
    assert len(read.kernels) == MAX_KERNELS
    assert metrics == (Metric("x", 1.0, "ns"),)
    good = message["kernels"][0]
    for forged in (
        {}, {"kernels": 3}, message | {"span_ns": float("nan")}, message | {"busy_ns": "much"},
        message | {"kernels": [good | {"name": 7}]}, message | {"kernels": [good | {"grid": [1, 2]}]},
        message | {"kernels": [{}]}, message | {"metrics": [["a", True, "b"]]},
    ):  # fmt: skip
        with pytest.raises(ProfileError):
            parse_call(forged)
    escapes = message | {"kernels": [good | {"name": "\x1b[2Jgone\n" * 40}]}
    assert parse_call(escapes)[0].kernels[0].name.isprintable()


def test_kernels_of_a_kineto_trace_belong_to_the_marked_call_that_they_start_in() -> None:
    shape = {"grid": [8, 1, 1], "block": [128, 1, 1], "registers per thread": 40, "shared memory": 2048}
    kernel = {"cat": "kernel", "name": "rms", "args": shape | {"est. achieved occupancy %": 50}}
    mark = {"cat": "user_annotation", "name": MARK}
    events = [
        kernel | {"ts": 5.0, "dur": 9.0},  # the flush of the L2, before the mark
        mark | {"ts": 20.0, "dur": 30.0}, kernel | {"ts": 25.0, "dur": 3.0}, kernel | {"ts": 30.0, "dur": 3.0},
        mark | {"ts": 100.0, "dur": 9.0}, {"cat": "cpu_op", "name": "aten::mul", "ts": 101.0, "dur": 1.0},
    ]  # fmt: skip
    (call,) = calls_in({"traceEvents": events})
    assert call.kernels == (Kernel("rms", 2, 6000.0, (8, 1, 1), (128, 1, 1), 40, 2048, 0.5),)
    with pytest.raises(ProfileError, match="no kernel"):
        calls_in({"traceEvents": events[-2:]})


# -- Nsight Systems ----------------------------------------------------------------------------------------------------

SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT NOT NULL, end INT NOT NULL, eventClass INT NOT NULL, globalTid INT,
    correlationId INT, nameId INT NOT NULL, returnValue INT NOT NULL, callchainId INT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL,
    contextId INT NOT NULL, streamId INT NOT NULL, correlationId INT, globalPid INT, demangledName INT NOT NULL,
    shortName INT NOT NULL, mangledName INT, launchType INT, cacheConfig INT, registersPerThread INT NOT NULL,
    gridX INT NOT NULL, gridY INT NOT NULL, gridZ INT NOT NULL, blockX INT NOT NULL, blockY INT NOT NULL,
    blockZ INT NOT NULL, staticSharedMemory INT NOT NULL, dynamicSharedMemory INT NOT NULL,
    localMemoryPerThread INT NOT NULL, localMemoryTotal INT NOT NULL, gridId INT NOT NULL, sharedMemoryExecuted INT,
    graphNodeId INT, sharedMemoryLimitConfig INT);
"""
"""The tables read, with the columns that NVIDIA's "SQLite Export Schema Reference" gives them."""


def export(path: Path, script: str = SCHEMA) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    database.executescript(script)
    return database


def test_an_export_of_nsight_systems_is_read_by_its_documented_schema(tmp_path: Path) -> None:
    path = tmp_path / "report.sqlite"
    database = export(path)
    names = [(1, "rms_kernel"), (2, "void rms_kernel<float>(float*)"), (3, "cudaLaunchKernel_v7000"), (4, "cudaMalloc")]
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", names)
    values = "?,?,0,1,7,?,9,2,1,NULL,0,0,40,8,2,1,128,1,1,1024,512,0,0,1,0,0,0"
    row = f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({values})"
    database.executemany(row, [(1000, 5000, 11), (7000, 9000, 12)])
    api = "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?,?,0,1,?,?,0,NULL)"
    database.executemany(api, [(500, 900, 11, 3), (5100, 5200, 12, 3), (0, 400, 10, 4)])
    database.commit()
    database.close()
    trace = nsys.parse(path)
    assert trace.call.kernels == (Kernel("rms_kernel", 2, 6000, (8, 2, 1), (128, 1, 1), 40, 1536, None),)
    assert (trace.call.span_ns, trace.call.busy_ns, trace.launch_api_ns) == (8000, 6000, 500)


def test_an_export_without_kernels_and_other_files_are_one_line_each(tmp_path: Path) -> None:
    export(tmp_path / "empty.sqlite", "CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT)").close()
    export(tmp_path / "other.sqlite", "CREATE TABLE something (a INT)").close()
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    changed = SCHEMA.replace("shortName INT NOT NULL,", "").replace("demangledName INT NOT NULL,", "")
    export(tmp_path / "changed.sqlite", changed).close()
    for name, said in (
        ("empty", "launched no kernel"), ("other", "no export"), ("text", "can't be read"),
        ("changed", "schema changed"), ("missing", "can't be read"),
    ):  # fmt: skip
        with pytest.raises(ProfileError, match=said):
            nsys.parse(tmp_path / f"{name}.sqlite")


def test_limits_below_a_twentieth_are_not_worth_a_line() -> None:
    small, large = Limit("a", 0.04, "", ""), Limit("b", 0.3, "", "")
    several = [Limit(f"c{n}", 0.1, "", "") for n in range(4)]
    assert [limit.title for limit in summary.limits_of([small, large])] == ["b"]
    assert [limit.title for limit in summary.limits_of([small, *several, large])] == ["b", "c0", "c1"]
    assert Roofline(None, None, None, None, "", "task", "unknown").memory is None

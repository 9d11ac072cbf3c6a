"""What NVLink carries beside the payload: bytes by the links' own counters, for each way of moving the same pages.

    python -m bench.kv_links --json F

The driver counts data, and data with protocol (raw). Their ratio to the bytes moved says whether a method's distance to
the copy engine is overhead on the link or time in which the link is idle.
Exit status: 0; 2 when the machine has fewer than two GPUs or keeps no such counters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import kv_methods as methods
from bench.kv_rig import LenderProcess, Rig, Tables
from bench.kv_rows import DIRECTIONS
from bench.kv_shapes import GIB, MIB, sweep
from bench.machine import new_report, write_report
from specgen_engine.kv.native import _kv

COUNTERS = {"data_tx": 138, "data_rx": 139, "raw_tx": 140, "raw_rx": 141}  # NVML_FI_DEV_NVLINK_THROUGHPUT_*, KiB
ALL_LINKS = 0xFFFFFFFF
REPEATS = 20
METHODS = ("copy-engine", "auto", "vector")


def read_counters() -> dict[str, int]:
    """Bytes that GPU 0's links have sent and received. Raises NotHere when the driver keeps no count."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    values = pynvml.nvmlDeviceGetFieldValues(handle, [(field, ALL_LINKS) for field in COUNTERS.values()])
    if failed := [value.nvmlReturn for value in values if value.nvmlReturn != 0]:
        raise methods.NotHere(f"the driver answers {failed[0]} to NVLink's throughput counters")
    return {name: int(value.value.ullVal) * 1024 for name, value in zip(COUNTERS, values, strict=True)}


def carried(move: Callable[[], None]) -> tuple[dict[str, int], float]:
    """(bytes by counter, seconds) of REPEATS transfers."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    move()
    torch.cuda.synchronize()
    before = read_counters()
    start.record()
    for _ in range(REPEATS):
        move()
    end.record()
    torch.cuda.synchronize()
    after = read_counters()
    return {name: after[name] - before[name] for name in COUNTERS}, start.elapsed_time(end) / 1e3


def mover(rig: Rig, method: str, direction: str, tables: Tables) -> Callable[[], None]:
    stream = torch.cuda.current_stream().cuda_stream
    if method == "copy-engine":
        move = methods.copy_engine(rig, direction, len(tables) * rig.shape.page_bytes)
    else:
        config = methods.config_for(method, rig, direction, len(tables), 16)
        move = methods.ours(rig, direction, config, lane=1)
    return lambda: move(tables, stream)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_links", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    count = _kv.device_count() if _kv.HAS_CUDA else 0
    if count < 2:
        print(f"error: needs 2 GPUs, this machine has {count}", file=sys.stderr)
        return 2
    report = new_report("specgen.kv_links/1", 0, "bench.kv_links")
    report["rows"] = []
    with LenderProcess("cuda", 1, 64, GIB * 3 // (2 * 64 * MIB) + 4) as lender, torch.cuda.stream(torch.cuda.Stream()):
        rig = Rig("cuda:0", lender, 64, sweep(2), GIB, seed=0)
        tables = rig.tables(GIB // rig.shape.page_bytes)
        payload = REPEATS * len(tables) * rig.shape.page_bytes
        try:
            for method in METHODS:
                for direction in DIRECTIONS:
                    counted, seconds = carried(mover(rig, method, direction, tables))
                    row = {"method": method, "direction": direction, "gbps": payload / seconds / 1e9}
                    row |= {name: value / payload for name, value in counted.items()}
                    print(row, flush=True)
                    report["rows"].append(row)
        except methods.NotHere as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            rig.close()
    write_report(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

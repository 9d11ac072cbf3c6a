"""A small transfer by every kernel, both ways, verified: what compute-sanitizer and ncu are run on.

    compute-sanitizer --tool memcheck python -m bench.kv_sanitize
    ncu --clock-control none -k regex:copy_pages python -m bench.kv_sanitize --mib 256

Exit status: 0; 1 when bytes were wrong; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from bench.kv_rig import LenderProcess, Rig, Tables
from bench.kv_shapes import MIB, Shape
from specgen_engine.kv.native import _kv


def launch(rig: Rig, direction: Any, config: Any, tables: Tables) -> None:
    import torch

    rig.copier.launch(direction, tables.addresses(), config, torch.cuda.current_stream().cuda_stream)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_sanitize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=0, help="bytes to move (default: 41 pages of 8,720 bytes)")
    args = parser.parse_args(argv)
    count = _kv.device_count() if _kv.HAS_CUDA else 0
    if count == 0:
        print("error: needs 1 GPU, this machine has none", file=sys.stderr)
        return 2
    shape = Shape("qwen3-8b/page1", (2048,) * 72) if args.mib else Shape("mixed", (2048,) * 4 + (528,))
    chunk_mib = 64 if args.mib else 2
    batch = args.mib * MIB or 41 * shape.page_bytes
    wrong = 0
    with LenderProcess("cuda", min(1, count - 1), chunk_mib, int(batch * 1.5) // (chunk_mib * MIB) + 4) as lender:
        rig = Rig("cuda:0", lender, chunk_mib, shape, batch, seed=0)
        tables = rig.tables(batch // shape.page_bytes)
        for config in (
            _kv.select_copy_config(2048, batch, _kv.Direction.EXPORT, 16),
            _kv.CopyConfig("vector", 16, 32, 0, 0),
            _kv.CopyConfig("bulk", 7, 3, 4, 8192, tiles_per_warp=3),
        ):
            for direction, verify in ((_kv.Direction.EXPORT, rig.verify_push), (_kv.Direction.IMPORT, rig.verify_pull)):
                right = verify(partial(launch, rig, direction, config), tables, True)
                print(f"{config} {direction.name}: {'right' if right else 'WRONG BYTES'}", flush=True)
                wrong += not right
        rig.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""KV page transfers to and from a peer GPU's lent memory: ours beside the copy engine and what else would do it.

    python -m bench.kv_transfer --json F [--plot F.png] [--quick] [--tune] [--only WORD ...]
    python -m bench.kv_transfer --plot-from F --plot F.png

Seeded random block tables; every row's bytes are verified, untouched pages too. The ceiling is the copy engine moving
the same number of contiguous bytes between the same memories in the same run. A lender process owns the second GPU's
memory.
`--backend loopback` rehearses the whole command in shared memory: its numbers say nothing about a GPU.
Exit status: 0; 1 when a row failed verification; 2 when the machine has fewer than two GPUs or an option is wrong.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.kv_shapes import (
    GIB,
    LATENCY_PAGES,
    LATENCY_SHAPE,
    MIB,
    MODEL_SHAPES,
    PIECES,
    SWEEP_KIB,
    Case,
    Shape,
    batches_of,
    pieces,
    qwen3_8b,
    sweep,
)
from bench.machine import new_report, write_report

SCHEMA = "specgen.kv_transfer/1"
HEADLINE_BATCHES = (256 * MIB, GIB)
SM_CURVE = (4, 8, 10, 12, 14, 16, 32, 132)
SM_CURVE_CHUNKS = (1 << 10, 2 << 10, 32 << 10)
GROUPS = ("ours", "paths", "others", "peers", "both", "decode")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--plot", type=Path, help="draw the report's curves")
    parser.add_argument("--plot-from", type=Path, nargs="+", help="draw existing reports and measure nothing")
    parser.add_argument("--backend", choices=("cuda", "loopback"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few small cases")
    parser.add_argument("--tune", action="store_true", help="also try launch shapes at 16 SMs, and rows with the best")
    parser.add_argument("--only", nargs="*", default=[], help="shapes whose name contains one of these words")
    parser.add_argument("--chunk-kib", type=int, nargs="*", default=[], help="shapes with chunks of these sizes only")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out shapes whose name contains one of these words")
    parser.add_argument("--no-curve", action="store_true", help="16 SMs only")
    parser.add_argument(
        "--libraries", nargs="*", choices=("nixl", "mooncake"), default=("nixl", "mooncake"), help="peers to start"
    )
    parser.add_argument("--segment-bytes", type=int, default=8192, help="largest piece of a chunk one bulk copy moves")
    parser.add_argument("--chunk-mib", type=int, default=64, help="size of an arena chunk")
    parser.add_argument("--budget-s", type=float, default=600, help="start no further shape after this many seconds")
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=GROUPS, help="the rows wanted (default: all)")
    parser.add_argument("--most-mib", type=int, default=1024, help="leave out larger batches")
    parser.add_argument(
        "--sgl-kernel", type=Path, help="sgl_kernel's common_ops shared library, where the package isn't installed"
    )
    args = parser.parse_args(argv)
    if args.plot_from and not args.plot:
        parser.error("--plot-from needs --plot")
    if not args.plot_from and not args.json:
        parser.error("--json is missing: name the report's file")
    return args


def shapes(args: argparse.Namespace) -> list[Shape]:
    sizes = (2, 32) if args.quick else SWEEP_KIB
    listed = [LATENCY_SHAPE]
    if args.quick:
        listed += [*(sweep(kib) for kib in sizes), sweep(2, "layer_first"), qwen3_8b(1)]
    else:
        listed += [*(sweep(kib) for kib in sizes[:2]), *MODEL_SHAPES, *(pieces(size) for size in PIECES)]
        listed += [*(sweep(kib) for kib in sizes[2:]), *(sweep(kib, "layer_first") for kib in sizes)]
    wanted = [shape for shape in listed if not args.only or any(word in shape.name for word in args.only)]
    wanted = [shape for shape in wanted if not args.chunk_kib or shape.chunk_bytes >> 10 in args.chunk_kib]
    return [shape for shape in wanted if not any(word in shape.name for word in args.skip)]


def cases(shape: Shape, args: argparse.Namespace) -> list[Case]:
    """A shape's batches at 16 SMs, and the SM curve at the headline batches of sweeps."""
    listed = {(case.pages, case.sms): case for case in all_cases(shape, args.quick)}.values()
    return [c for c in listed if c.batch_bytes <= args.most_mib * MIB and not (args.no_curve and c.sms != 16)]


def all_cases(shape: Shape, quick: bool) -> list[Case]:
    if shape is LATENCY_SHAPE:
        return [Case(shape, LATENCY_PAGES * shape.page_bytes, sms) for sms in (8, 16, 32)]
    listed = [Case(shape, batch, 16) for batch in batches_of(shape, quick)]
    if shape.name == "pieces":
        listed += [Case(shape, GIB, sms) for sms in (32, 132)]
    if shape.name == "sweep" and shape.chunk_bytes in SM_CURVE_CHUNKS and not quick:
        listed += [Case(shape, batch, sms) for batch in HEADLINE_BATCHES for sms in SM_CURVE if sms != 16]
    return listed


def print_row(row: dict[str, Any]) -> None:
    speed = f"{row['gbps']:7.1f} GB/s {row['us']:9.1f} us" if row.get("gbps") else f"skipped: {row.get('skipped')}"
    share = f" {row['of_ceiling'] * 100:5.1f} % of the copy engine" if row.get("of_ceiling") else ""
    slower = f" decode {row['decode_slowdown'] * 100:+.1f} %" if row.get("decode_slowdown") is not None else ""
    verified = "" if row.get("verified") else "  NOT VERIFIED" if row.get("verified") is False else ""
    print(
        f"{row['method']:<22} {row['direction']:<4} {row['shape']:<22} {row['chunk_bytes']:>7} B x "
        f"{row['pages']:>6} pages "
        f"{row['sms'] or '-':>4} SMs {speed}{share}{slower}{verified}",
        flush=True,
    )


def measure_all(args: argparse.Namespace, report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from bench.kv_peers import Peers
    from bench.kv_rig import SPARE_BOTH_WAYS, LenderProcess, Rig
    from bench.kv_rows import RowMaker
    from bench.kv_timing import kernel_floor_us

    device = "cuda:0" if args.backend == "cuda" else "cpu"
    largest = 16 * MIB if args.quick else min(GIB, args.most_mib * MIB)
    # A page is at most a sixth of a chunk: what chunks lose at their ends is within the fifth added here.
    chunks = int(largest * SPARE_BOTH_WAYS * 1.2) // (args.chunk_mib * MIB) + 4
    start = time.monotonic()
    with LenderProcess(args.backend, 1, args.chunk_mib, chunks) as lender:
        largest_arena = chunks * args.chunk_mib * MIB
        wants_peers = "peers" in args.groups
        peers = Peers(args.backend == "cuda", largest_arena, args.libraries) if wants_peers else None
        maker = RowMaker(args, device, peers)
        if args.backend == "cuda":
            report["kernel_floor_us"] = kernel_floor_us()
        for shape in shapes(args):
            if time.monotonic() - start > args.budget_s:
                report.setdefault("not_run", []).append(f"{shape.name}/{shape.chunk_bytes}")
                continue
            listed = cases(shape, args)
            batch = max(case.batch_bytes for case in listed)
            segment_bytes = shape.segment_bytes or args.segment_bytes
            rig = Rig(
                device,
                lender,
                args.chunk_mib,
                shape,
                min(batch, largest),
                args.seed,
                segment_bytes,
                SPARE_BOTH_WAYS,
            )
            try:
                yield from maker.rows(rig, listed)
            finally:
                rig.close()
        if peers:
            peers.close()
        report["ceiling"] = maker.ceiling()
        report["tuned"] = maker.tuned


def require_gpus(args: argparse.Namespace) -> str | None:
    """What the machine lacks for this run, None when nothing."""
    try:
        from specgen_engine.kv.native import _kv
    except ImportError as error:
        return str(error)
    if args.backend == "cuda" and not _kv.HAS_CUDA:
        return "specgen_engine._kv was built without CUDA: rebuild it with nvcc (`python -m bench.gpu_build`)"
    count = _kv.device_count() if args.backend == "cuda" else 2
    return (
        None
        if count >= 2
        else f"needs 2 GPUs with peer access, this machine has {count}: `--backend loopback` rehearses without"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.plot_from:
        from bench.kv_plot import plot_report

        return plot_report(args.plot_from, args.plot)
    if missing := require_gpus(args):
        print(f"error: {missing}", file=sys.stderr)
        return 2
    import torch

    torch.manual_seed(args.seed)
    # A time limit from outside still leaves the rows measured so far.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = new_report(SCHEMA, args.seed, "bench.kv_transfer")
    report |= {"backend": args.backend, "ceiling": {}, "rows": []}
    try:
        # Not the legacy default stream: cudaMemcpyBatchAsync refuses it.
        with torch.cuda.stream(torch.cuda.Stream()) if args.backend == "cuda" else nullcontext():
            for row in measure_all(args, report):
                print_row(row)
                report["rows"].append(row)
    finally:
        write_report(args.json, report)
    if args.plot:
        from bench.kv_plot import plot_report

        plot_report([args.json], args.plot)
    wrong = [row for row in report["rows"] if row.get("verified") is False]
    print(f"{len(report['rows'])} rows, {len(wrong)} with wrong bytes; report in {args.json}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

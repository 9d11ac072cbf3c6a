"""What the KV transport promises when things go wrong, shown with real processes.

    python -m bench.kv_failures --json F [--backend loopback]

- lender killed (SIGKILL) while copies are in flight: the borrower finishes, its data are right, and the memory returns
  once it has unmapped;
- a busy GiB is revoked: bytes back within the bound, while copies to another lender go on.
Exit status: 0; 1 when a promise was broken; 2 when the machine has too few GPUs.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench.kv_rig import LenderProcess, Rig
from bench.kv_shapes import GIB, MIB, Shape
from bench.machine import new_report, write_report
from specgen_engine.kv.base import ArenaFull, KvError, StalePages
from specgen_engine.kv.native import _kv

BOUND_S = {"cuda": 0.05, "loopback": 0.5}  # in shared memory the copies compete with the lender for the CPUs
SHAPE = Shape("qwen3-8b/page16", (32768,) * 72, "layer_first")


def free_bytes(device: str) -> int:
    """Free memory where the lender's chunks lie: GPU 1, or shared memory by the kernel's count."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(1)[0])
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return -int(line.split()[1]) * 1024


def import_matches(rig: Rig, rounds: int) -> bool:
    """Every page back into the pool, compared with what was exported."""
    expected = rig.pool.clone()
    rig.pool.zero_()
    for _ in range(rounds):
        rig.arena.import_(range(rig.pages), rig.refs).result(timeout_s=30)
    return torch.equal(rig.pool, expected)


def killed_mid_copy(device: str, batch: int, chunk_mib: int) -> dict[str, Any]:
    """SIGKILL between submitting copies and their end; then everything is read back."""
    before = free_bytes(device)
    backend = "cuda" if device.startswith("cuda") else "loopback"
    lender = LenderProcess(backend, 1, chunk_mib, batch * 2 // (chunk_mib * MIB) + 4)
    rig = Rig(device, lender, chunk_mib, SHAPE, batch, seed=1)
    rig.arena.export(range(rig.pages), rig.refs).result(timeout_s=30)
    lent = before - free_bytes(device)
    copies = [rig.arena.export(range(rig.pages), rig.refs) for _ in range(20)]
    in_flight = sum(not copy.done() for copy in copies)
    lender.kill()
    for copy in copies:
        copy.result(timeout_s=60)
    deadline = time.monotonic() + 5
    while rig.link.lost is None and time.monotonic() < deadline:
        time.sleep(0.005)
    data_right = import_matches(rig, rounds=2)
    held = before - free_bytes(device)
    refused = False
    try:
        rig.arena.allocate(1)
    except ArenaFull:
        refused = True
    rig.arena.check_integrity()
    rig.link.close()
    counts = rig.arena.check_integrity()
    time.sleep(0.2)
    kept = before - free_bytes(device)
    lender.close()
    return {
        "name": "lender killed mid-copy",
        "copies_in_flight_at_kill": in_flight,
        "borrower_noticed": rig.link.lost,
        "data_right": data_right,
        "new_pages_refused": refused,
        "bytes_lent": lent,
        "bytes_held_after_kill": held,
        "bytes_kept_after_unmap": kept,
        "ok": bool(in_flight and data_right and refused and counts.total == 0 and kept < lent // 4),
    }


def revoked_while_busy(device: str, batch: int, chunk_mib: int) -> dict[str, Any]:
    """All of one lease called back during copies, with a second lender's copies going on."""
    backend = "cuda" if device.startswith("cuda") else "loopback"
    chunks = batch * 2 // (chunk_mib * MIB) + 4
    stop = threading.Event()
    done = {"busy": 0, "other": 0}
    with (
        LenderProcess(backend, 1, chunk_mib, chunks) as lender,
        LenderProcess(backend, 1, chunk_mib, chunks) as other_lender,
    ):
        rig = Rig(device, lender, chunk_mib, SHAPE, batch, seed=2)
        other = Rig(device, other_lender, chunk_mib, SHAPE, batch // 8, seed=3)
        workers = [
            threading.Thread(target=_copy_until, args=(r, stop, done, key))
            for r, key in ((rig, "busy"), (other, "other"))
        ]
        for worker in workers:
            worker.start()
        time.sleep(0.3)
        before = dict(done)
        report = lender.ask(f"revoke {rig.link.epoch} all {BOUND_S[backend]}")
        time.sleep(0.3)
        after = dict(done)
        books = lender.ask("counts")
        stop.set()
        for worker in workers:
            worker.join(timeout=60)
        rig.arena.check_integrity()
        other_right = import_matches(other, rounds=1)
        other.close()
        rig.close()
    return {
        "name": "busy lease revoked",
        "bytes": report["chunks"] * chunk_mib * MIB,
        "seconds": report["seconds"],
        "outstanding": report["outstanding"],
        "bound_s": BOUND_S[backend],
        "lender_books": books,
        "copies_before": before,
        "other_copies_since": after["other"] - before["other"],
        "other_data_right": other_right,
        "ok": bool(
            report["outstanding"] == 0
            and report["seconds"] <= BOUND_S[backend]
            and before["busy"] > 0
            and after["other"] > before["other"]
            and other_right
            and books["used"] == 0
        ),
    }


def _copy_until(rig: Rig, stop: threading.Event, done: dict[str, int], key: str) -> None:
    """Exports, two in flight at a time, until told to stop or the pages are gone."""
    pending: list[Any] = []
    while not stop.is_set():
        try:
            pending.append(rig.arena.export(range(rig.pages), rig.refs))
            if len(pending) > 2:
                pending.pop(0).result(timeout_s=30)
                done[key] += 1
        except StalePages:
            break
    for copy in pending:
        copy.result(timeout_s=30)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_failures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--backend", choices=("cuda", "loopback"), default="cuda")
    parser.add_argument("--mib", type=int, help="bytes lent in each scenario (default 1024 on GPUs, 16 in loopback)")
    args = parser.parse_args(argv)
    count = _kv.device_count() if args.backend == "cuda" and _kv.HAS_CUDA else 0
    if args.backend == "cuda" and count < 2:
        print(f"error: needs 2 GPUs, this machine has {count}: `--backend loopback` rehearses without", file=sys.stderr)
        return 2
    device = "cuda:0" if args.backend == "cuda" else "cpu"
    batch = args.mib * MIB if args.mib else GIB if args.backend == "cuda" else 16 * MIB
    report = new_report("specgen.kv_failures/1", None, "bench.kv_failures")
    report["scenarios"] = []
    for scenario in (killed_mid_copy, revoked_while_busy):
        try:
            result = scenario(device, batch, 64 if args.backend == "cuda" else 8)
        except (KvError, RuntimeError) as error:
            result = {"name": scenario.__name__, "ok": False, "error": f"{type(error).__name__}: {error}"}
        report["scenarios"].append(result)
        print(result, flush=True)
    write_report(args.json, report)
    return 0 if all(result["ok"] for result in report["scenarios"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A bench.kv_transfer report against what the transport must show: `python -m bench.kv_headline REPORT`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 1 << 20
OURS = ("ours-auto", "ours-tuned", "ours-bulk", "ours-vector")


def by_size(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["gbps"] and row["method"] != "tune" and not row["method"].endswith("decode"):
            groups[row["shape"], row["chunk_bytes"], row["bytes"], row["direction"]].append(row)
    return groups


def ceilings_line(group: list[dict[str, Any]]) -> str:
    """Ours at each SM budget as a share of the copy engine's figure."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in group:
        if row["method"] in OURS and row["of_ceiling"]:
            best[row["method"], row["sms"]] = row
    return "  ".join(
        f"{m[5:]}@{s}: {r['gbps']:.0f} ({r['of_ceiling'] * 100:.0f} %)"
        for (m, s), r in sorted(best.items(), key=lambda e: e[0][::-1])
    )


def fastest_other(group: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The library's own choice at 16 SMs or fewer, and the fastest row of anyone else but the contiguous ceiling."""
    own = [row for row in group if row["method"] == "ours-auto" and row["sms"] <= 16]
    others = [row for row in group if row["method"] not in (*OURS, "copy-engine", "host-pinned")]
    return max(own, key=lambda r: r["gbps"], default=None), max(others, key=lambda r: r["gbps"], default=None)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print("usage: python -m bench.kv_headline REPORT.json", file=sys.stderr)
        return 2
    report = json.loads(Path(argv[0]).read_text())
    rows = report["rows"]
    print("ceiling", {way: round(value, 1) for way, value in report["ceiling"].items()}, "tuned", report.get("tuned"))
    unverified = [row for row in rows if row["verified"] is False]
    print(f"{len(rows)} rows, {len(unverified)} with wrong bytes; not run: {report.get('not_run', [])}")
    for (shape, chunk, size, way), group in by_size(rows).items():
        if shape.startswith("sweep") and size > 128 * MIB:
            print(f"{way:<4} {shape:<18} {chunk:>6} B {size / MIB:6.0f} MiB  {ceilings_line(group)}")
    for (shape, chunk, size, way), group in by_size(rows).items():
        own, other = fastest_other(group)
        if own and other and size <= 64 * MIB and other["us"] < own["us"]:
            print(
                f"beaten: {way} {shape} {chunk} B, {size / MIB:.2f} MiB: "
                f"{other['method']} {other['us']:.1f} us, ours {own['us']:.1f} us"
            )
    for row in rows:
        if row["shape"] == "single" and row["method"] in OURS:
            print(
                f"64 x 32 KiB {row['direction']} {row['method']} {row['sms']} SMs: "
                f"p50 {row['p50_us']:.1f} us p99 {row['p99_us']:.1f} us"
            )
        if row["decode_slowdown"] is not None:
            print(
                f"decode {row['decode_slowdown'] * 100:+.1f} % {row['direction']} {row['chunk_bytes']} B "
                f"{row['sms']} SMs "
                f"duty {row['duty']}: {row['gbps']:.0f} GB/s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A bench.kv_transfer report against what the transport must show: `python -m bench.kv_headline REPORT`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 1 << 20
OURS = ("ours-auto", "ours-tuned", "ours-bulk", "ours-vector", "ours-static", "ours-sequential")


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


def print_headlines(rows: list[dict[str, Any]]) -> None:
    for (shape, chunk, size, way), group in by_size(rows).items():
        if size > 128 * MIB and (line := ceilings_line(group)):
            print(f"{way:<4} {shape:<20} {chunk:>6} B {size / MIB:6.0f} MiB  {line}")


def print_beaten(rows: list[dict[str, Any]]) -> None:
    """Where someone else's row is faster than the library's own choice, up to 64 MiB."""
    for (shape, chunk, size, way), group in by_size(rows).items():
        own, other = fastest_other(group)
        if own and other and size <= 64 * MIB and other["us"] < own["us"]:
            print(
                f"beaten: {way} {shape} {chunk} B, {size / MIB:.2f} MiB: "
                f"{other['method']} {other['us']:.1f} us, ours {own['us']:.1f} us"
            )


def print_small(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["shape"] == "single" and row["method"] in OURS:
            print(
                f"64 x 32 KiB {row['direction']} {row['method']} {row['sms']} SMs: "
                f"p50 {row['p50_us']:.1f} us p99 {row['p99_us']:.1f} us"
            )
    for row in rows:
        if row["method"] == "ours-auto" and row["sm_budget"] == 16 and row["bytes"] <= 16 * MIB:
            print(
                f"small {row['direction']} {row['shape']} {row['chunk_bytes']} B, {row['bytes']} B: {row['us']:.1f} us"
            )


def print_decode(rows: list[dict[str, Any]]) -> None:
    """Slowdown of a decode step against GB/s, slowest first."""
    beside = [row for row in rows if row.get("decode_slowdown") is not None]
    for row in sorted(beside, key=lambda r: (r["direction"], r["gbps"])):
        pace = f" paced to {row['max_gbps']:.0f}" if row.get("max_gbps") else ""
        print(
            f"decode {row['direction']} {row['gbps']:6.1f} GB/s {row['decode_slowdown'] * 100:+6.1f} % "
            f"{row['method'].removesuffix('+decode')} {row['sms'] or '-'} SMs duty {row['duty']}{pace}"
        )


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print("usage: python -m bench.kv_headline REPORT.json", file=sys.stderr)
        return 2
    report = json.loads(Path(argv[0]).read_text())
    rows = report["rows"]
    print("ceiling", {way: round(value, 1) for way, value in report["ceiling"].items()}, "tuned", report.get("tuned"))
    unverified = [row for row in rows if row["verified"] is False]
    print(
        f"{len(rows)} rows, {len(unverified)} with wrong bytes; not run: {report.get('not_run', [])}; "
        f"kernel floor {report.get('kernel_floor_us')} us"
    )
    print_headlines(rows)
    print_beaten(rows)
    print_small(rows)
    print_decode(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

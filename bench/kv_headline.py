"""A bench.kv_transfer report against what the transport must show: `python -m bench.kv_headline REPORT`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

MIB = 1 << 20
SHARES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.92, 0.95)


def by_size(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["gbps"] and row["method"] != "tune" and not row["method"].endswith("decode"):
            clock = row.get("clock", "device")
            groups[row["shape"], row["chunk_bytes"], row["bytes"], row["direction"], clock].append(row)
    return groups


def ceilings_line(group: list[dict[str, Any]]) -> str:
    """Ours at each SM budget as a share of the copy engine's figure."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in group:
        if row["method"].startswith("ours-") and row["of_ceiling"]:
            best[row["method"], row["sms"]] = row
    return "  ".join(
        f"{m[5:]}@{s}: {r['gbps']:.0f} ({r['of_ceiling'] * 100:.0f} %)"
        for (m, s), r in sorted(best.items(), key=lambda e: e[0][::-1])
    )


def fastest_other(group: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The library's own choice at 16 SMs or fewer, and the fastest row of anyone else but the contiguous ceiling."""
    own = [row for row in group if row["method"] in ("ours-auto", "call-direct") and row["sms"] <= 16]
    ours = ("ours-", "call-direct", "call-staged", "call-engine", "copy-engine", "host-pinned")
    others = [row for row in group if not row["method"].startswith(ours)]
    return max(own, key=lambda r: r["gbps"], default=None), max(others, key=lambda r: r["gbps"], default=None)


def print_headlines(rows: list[dict[str, Any]]) -> None:
    for (shape, chunk, size, way, clock), group in by_size(rows).items():
        if clock == "device" and size > 128 * MIB and (line := ceilings_line(group)):
            print(f"{way:<4} {shape:<20} {chunk:>6} B {size / MIB:6.0f} MiB  {line}")


def print_beaten(rows: list[dict[str, Any]]) -> None:
    """Where someone else's row is faster than the library's own choice, up to 64 MiB."""
    compared = 0
    for (shape, chunk, size, way, clock), group in by_size(rows).items():
        own, other = fastest_other(group)
        compared += own is not None and other is not None
        if own and other and size <= 64 * MIB and other["us"] < own["us"]:
            print(
                f"beaten by the {clock}'s clock: {way} {shape} {chunk} B, {size / MIB:.2f} MiB: "
                f"{other['method']} {other['us']:.1f} us, ours {own['us']:.1f} us"
            )
    print(f"{compared} sizes had another's row to compare with")


def print_fewest_sms(rows: list[dict[str, Any]]) -> None:
    """The fewest SMs of those tried that reach each share of the copy engine."""
    for (shape, chunk, size, way, clock), group in by_size(rows).items():
        reached = {
            share: min(
                (r["sms"] for r in group if r["method"] == "ours-auto" and (r["of_ceiling"] or 0) >= share),
                default=None,
            )
            for share in SHARES
            if way != "both"
        }
        if clock == "device" and size > 512 * MIB and len({r["sms"] for r in group if r["method"] == "ours-auto"}) > 2:
            listed = ", ".join(f"{share * 100:.0f} %: {sms or 'none'}" for share, sms in reached.items())
            print(f"fewest SMs, {way} {shape} {chunk} B: {listed}")


def print_calls(rows: list[dict[str, Any]]) -> None:
    """From the call to the bytes' arrival by the host's clock."""
    for (shape, chunk, size, way, clock), group in by_size(rows).items():
        if clock == "host" and any(row["method"] == "call-direct" for row in group):
            listed = sorted((row["us"], row["method"]) for row in group)
            print(
                f"call {way} {shape} {chunk} B {size / MIB:.2f} MiB:", ", ".join(f"{m} {u:.0f} us" for u, m in listed)
            )


def print_small(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["shape"] == "single" and row["method"].startswith("ours-"):
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
    print_fewest_sms(rows)
    print_beaten(rows)
    print_calls(rows)
    print_small(rows)
    print_decode(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

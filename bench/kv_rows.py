"""Rows of bench.kv_transfer: what is run for a case, in which order, and what a row says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import kv_methods as methods
from bench.kv_methods import Move, NotHere
from bench.kv_more_rows import both_rows, decode_rows_staged, path_rows, peer_rows
from bench.kv_peers import Peers
from bench.kv_rig import Rig, Tables
from bench.kv_shapes import MIB, Case
from bench.kv_timing import DecodeLoad, Job, Timing, beside_decode, measure
from specgen_engine.kv.native import _kv

DIRECTIONS = ("push", "pull")
TABLE_SETS = 4
TUNING_BATCH = 256 * MIB
TUNED_CHUNKS = (1 << 10, 2 << 10, 8 << 10, 32 << 10)
DECODE_CHUNKS = (2 << 10,)
DECODE_SMS = (1, 2, 4, 8, 16)
DECODE_PACES_GBPS = (25.0, 50.0, 100.0, 200.0)
SMALL_RINGS = (8, 16, 32, 64)  # SMs; one warp and 33 KiB each leave room for a decode kernel's blocks beside them
THOROUGH_CHUNKS = (2 << 10, 32 << 10)  # of the sweeps: the others have fewer methods, that a run may end
HEADLINE = 200 * MIB  # batches above it have rows that explain the others: equal shares, pages in order


class RowMaker:
    """Measures the rows of one rig after another, keeping the ceilings and tuned shapes between them."""

    def __init__(self, args: argparse.Namespace, device: str, peers: Peers | None = None) -> None:
        self.args = args
        self.peers = peers
        self.tuned: dict[str, str] = {}
        self._configs: dict[tuple[str, int], Any] = {}
        self._ceilings: dict[tuple[str, int], float] = {}
        self._load: DecodeLoad | None = None

    def ceiling(self) -> dict[str, float]:
        """The copy engine's best contiguous figure each way, GB/s."""
        best: dict[str, float] = {}
        for (direction, _), gbps in self._ceilings.items():
            best[direction] = max(best.get(direction, 0.0), gbps)
        return best

    def rows(self, rig: Rig, cases: list[Case]) -> Iterator[dict[str, Any]]:
        if self.args.tune and rig.on_gpu and rig.shape.chunk_bytes in TUNED_CHUNKS and rig.shape.name == "sweep":
            yield from self._tune(rig)
        if self.peers and "peers" in self.args.groups:
            self.peers.attach(rig)
        for case in cases:
            yield from self._case_rows(rig, case)
        if self.peers:
            self.peers.detach()
        beside_decode_too = rig.shape.name == "sweep" and rig.shape.chunk_bytes in DECODE_CHUNKS
        if rig.on_gpu and beside_decode_too and "decode" in self.args.groups:
            yield from self._decode_rows(rig)

    def _case_rows(self, rig: Rig, case: Case) -> Iterator[dict[str, Any]]:
        groups, pieces = self.args.groups, rig.shape.name == "pieces"
        sets = [rig.tables(case.pages) for _ in range(TABLE_SETS)]
        yield from self._ceiling_rows(rig, case, sets)
        for direction in DIRECTIONS:
            if "ours" in groups:
                yield from self._ours(rig, case, direction, sets)
            if "paths" in groups and rig.on_gpu and not pieces:
                yield from path_rows(self, rig, case, direction, sets)
            if "others" in groups and case.sms == 16 and not pieces:
                yield from self._others(rig, case, direction, sets)
            if "peers" in groups and case.sms == 16 and not pieces:
                yield from peer_rows(self, rig, case, direction, sets)
        if "both" in groups and (case.batch_bytes >= 16 * MIB or self.args.quick) and not pieces and case.sms == 16:
            yield from both_rows(self, rig, case)

    def row(
        self, rig: Rig, case: Case, method: str, direction: str, timing: Timing | None, **more: Any
    ) -> dict[str, Any]:
        moved = case.pages * rig.shape.page_bytes * (2 if direction == "both" else 1)
        row: dict[str, Any] = {
            "method": method,
            "direction": direction,
            "shape": rig.shape.name,
            "layout": rig.shape.layout,
            "chunk_bytes": rig.shape.chunk_bytes,
            "pages": case.pages,
            "bytes": case.pages * rig.shape.page_bytes,
            "sm_budget": case.sms,
            "sms": None,
            "gbps": moved / timing.p50 / 1e3 if timing else None,
            "us": timing.p50 if timing else None,
            "p50_us": timing.p50 if timing else None,
            "p99_us": timing.p99 if timing else None,
            "clock": "device" if rig.on_gpu else "host",
            "samples": timing.samples if timing else 0,
            "decode_slowdown": None,
            "verified": None,
        }
        ceiling = self._ceilings.get((direction, row["bytes"]))
        row["of_ceiling"] = row["gbps"] / ceiling if ceiling and row["gbps"] else None
        return row | more

    def _ceiling_rows(self, rig: Rig, case: Case, sets: list[Tables]) -> Iterator[dict[str, Any]]:
        size = case.pages * rig.shape.page_bytes
        if ("push", size) in self._ceilings or not rig.on_gpu:
            return
        for direction in DIRECTIONS:
            timing = measure(rig, [Job(methods.copy_engine(rig, direction, size), sets)])
            right = self._contiguous_right(rig, direction, size)
            row = self.row(rig, case, "copy-engine", direction, timing, verified=right)
            self._ceilings[direction, size] = row["gbps"]
            yield row | {"of_ceiling": 1.0}
        if size >= 16 * MIB // 2:
            # Each way is verified alone, above.
            jobs = [Job(move, sets, gpu) for gpu, move in enumerate(methods.copy_engines_both_ways(size))]
            row = self.row(rig, case, "copy-engine", "both", measure(rig, jobs))
            self._ceilings["both", size] = row["gbps"]
            yield row | {"of_ceiling": 1.0}

    def _contiguous_right(self, rig: Rig, direction: str, size: int) -> bool:
        rig.pool.add_(1)
        before, pool = rig.snapshot(), rig.pool.clone()
        target, source = (before, pool) if direction == "push" else (pool, before)
        target[:size] = source[:size]
        methods.copy_engine(rig, direction, size)(rig.tables(1), torch.cuda.current_stream().cuda_stream)
        rig.synchronize()
        return torch.equal(rig.snapshot(), before) and torch.equal(rig.pool, pool)

    def _ours(self, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Iterator[dict[str, Any]]:
        names: tuple[str, ...] = ("auto",)
        thorough = rig.shape.name != "sweep" or rig.shape.chunk_bytes in THOROUGH_CHUNKS
        if rig.on_gpu and case.sms == 16 and not thorough:
            names += ("vector",)
        elif rig.on_gpu and case.sms == 16:
            names += ("bulk", "vector", "static", "tiled")
        elif rig.on_gpu and case.sms == 12:
            names += ("static", "tiled")
        auto = methods.config_for("auto", rig, direction, case.pages, case.sms)
        for name in names:
            config = methods.config_for(name, rig, direction, case.pages, case.sms)
            if name != "auto" and repr(config) == repr(auto):
                continue
            yield self.ours_row(rig, case, f"ours-{name}", direction, sets, config)
        tuned = self._configs.get((direction, rig.arena.layout.slot_bytes))
        if tuned is not None:
            tiles = max(1, auto.tiles_per_warp * auto.warps // tuned.warps)
            config = _kv.CopyConfig(tuned.method, case.sms, tuned.warps, tuned.stages, tuned.stage_bytes, tiles)
            yield self.ours_row(rig, case, "ours-tuned", direction, sets, config)
        if rig.on_gpu and case.batch_bytes > HEADLINE and case.sms == 16:
            in_order = [rig.sequential_tables(case.pages)]
            yield self.ours_row(rig, case, "ours-sequential", direction, in_order, auto)

    def ours_row(
        self, rig: Rig, case: Case, method: str, direction: str, sets: list[Tables], config: Any
    ) -> dict[str, Any]:
        move = methods.ours(rig, direction, config, lane=1)
        # An import can only find the tags right once the pages were exported.
        self.export_first(rig, sets)
        verified = self.verify(rig, direction, move, sets[0], tagged=True)
        timing = measure(rig, [Job(move, sets)])
        return self.row(rig, case, method, direction, timing, sms=config.sms, config=repr(config), verified=verified)

    def _others(self, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Iterator[dict[str, Any]]:
        size = case.pages * rig.shape.page_bytes
        makers: dict[str, Callable[[], Move]] = {}
        if rig.shape.name != "sweep" or rig.shape.chunk_bytes in THOROUGH_CHUNKS:
            makers["torch-index"] = lambda: methods.torch_index(rig, direction)
        if rig.on_gpu:
            makers["copy-batch"] = lambda: methods.copy_batch(rig, direction, sets)
            makers["host-pinned"] = lambda: methods.host_pinned(rig, direction, size)
        for name, make in makers.items():
            yield self._other_row(rig, case, name, direction, sets, make)
        for quota in (2, 16) if size < HEADLINE else (16,):
            yield self._sgl_row(rig, case, direction, sets, quota)

    def _other_row(
        self, rig: Rig, case: Case, name: str, direction: str, sets: list[Tables], make: Callable[[], Move]
    ) -> dict[str, Any]:
        try:
            move = make()
            right = (
                self._pinned_right(rig, case) if name == "host-pinned" else self.verify(rig, direction, move, sets[0])
            )
            timing = measure(rig, [Job(move, sets)])
        except NotHere as error:
            return self.row(rig, case, name, direction, None, skipped=str(error))
        except RuntimeError as error:
            return self.row(rig, case, name, direction, None, skipped=f"failed: {str(error).splitlines()[0]}")
        return self.row(rig, case, name, direction, timing, verified=right)

    def _pinned_right(self, rig: Rig, case: Case) -> bool:
        """Out and back: the pool's bytes return after the pool was changed."""
        size = case.pages * rig.shape.page_bytes
        rig.pool.add_(1)
        expected = rig.pool[:size].clone()
        for direction in DIRECTIONS:
            methods.host_pinned(rig, direction, size)(rig.tables(1), self.stream(rig))
            rig.synchronize()
            if direction == "push":
                rig.pool.add_(1)
        return torch.equal(rig.pool[:size], expected)

    def _sgl_row(self, rig: Rig, case: Case, direction: str, sets: list[Tables], quota: int) -> dict[str, Any]:
        name = f"sgl-kvcacheio/q{quota}"
        try:
            if not rig.on_gpu:
                raise NotHere("needs a GPU")
            move = methods.sgl_kvcacheio(rig, direction, quota, self.args.sgl_kernel)
            verified = methods.verify_sgl(rig, direction, move, sets[0])
            timing = measure(rig, [Job(move, sets)])
        except NotHere as error:
            return self.row(rig, case, name, direction, None, skipped=str(error))
        except RuntimeError as error:
            return self.row(rig, case, name, direction, None, skipped=f"failed: {str(error).splitlines()[0]}")
        return self.row(rig, case, name, direction, timing, verified=verified)

    def _decode_rows(self, rig: Rig) -> Iterator[dict[str, Any]]:
        """What copies cost a decode step, against the GB/s they reach: by SMs, by pace, by size of the ring."""
        self._load = self._load or DecodeLoad(rig.device)
        case = Case(rig.shape, TUNING_BATCH, 16)
        sets = [rig.tables(case.pages) for _ in range(TABLE_SETS)]
        self.export_first(rig, sets)
        size = case.pages * rig.shape.page_bytes
        for direction in DIRECTIONS:
            for method, config, duty in self._beside_decode(rig, direction, case):
                if config is None:
                    move, more = methods.copy_engine(rig, direction, size), {}
                    verified = self._contiguous_right(rig, direction, size)
                else:
                    move = methods.ours(rig, direction, config, lane=3)
                    verified = self.verify(rig, direction, move, sets[0], tagged=True)
                    more = {"sms": config.sms, "config": repr(config), "max_gbps": config.max_gbps}
                slowdown, gbps = beside_decode(rig, Job(move, sets), self._load, duty)
                row = self.row(rig, case, f"{method}+decode", direction, None, verified=verified)
                yield row | more | {"gbps": gbps, "us": size / gbps / 1e3, "decode_slowdown": slowdown, "duty": duty}
                if config is None:  # it wrote over the exported pages' tags
                    self.export_first(rig, sets)
            yield from decode_rows_staged(self, rig, case, direction, sets, self._load)

    def _beside_decode(self, rig: Rig, direction: str, case: Case) -> Iterator[tuple[str, Any, float]]:
        auto = {sms: methods.config_for("auto", rig, direction, case.pages, sms) for sms in DECODE_SMS}
        yield "copy-engine", None, 1.0
        for config in auto.values():
            yield "ours-auto", config, 1.0
        yield "ours-auto", auto[16], 0.1
        for gbps in DECODE_PACES_GBPS:
            for sms in (4, 16):
                c = auto[sms]
                paced = (c.method, c.sms, c.warps, c.stages, c.stage_bytes, c.tiles_per_warp, gbps)
                yield "ours-paced", _kv.CopyConfig(*paced), 1.0
        for sms in SMALL_RINGS:
            yield "ours-small", _kv.CopyConfig("bulk", sms, 1, 4, 8192, auto[16].tiles_per_warp), 1.0

    def _tune(self, rig: Rig) -> Iterator[dict[str, Any]]:
        """Launch shapes at 16 SMs; the best of each direction serves the rows named ours-tuned."""
        slot = rig.arena.layout.slot_bytes
        case = Case(rig.shape, TUNING_BATCH, 16)
        sets = [rig.tables(case.pages) for _ in range(TABLE_SETS)]
        for direction in DIRECTIONS:
            best = 0.0
            for config in tuning_shapes(slot, TUNING_BATCH):
                row = self.ours_row(rig, case, "tune", direction, sets, config)
                yield row
                if row["verified"] and row["gbps"] > best:
                    best = row["gbps"]
                    self._configs[direction, slot] = config
                    self.tuned[f"{direction}/{slot}"] = repr(config)

    def export_first(self, rig: Rig, sets: list[Tables]) -> None:
        config = methods.config_for("auto", rig, "push", len(sets[0]), 16)
        move = methods.ours(rig, "push", config, lane=1)
        for tables in sets:
            move(tables, self.stream(rig))
        rig.synchronize()

    def verify(self, rig: Rig, direction: str, move: Move, tables: Tables, tagged: bool = False) -> bool:
        run = lambda given: move(given, self.stream(rig))  # noqa: E731
        return (rig.verify_push if direction == "push" else rig.verify_pull)(run, tables, tagged)

    def ceiling_of(self, direction: str, size: int) -> float | None:
        return self._ceilings.get((direction, size))

    @staticmethod
    def stream(rig: Rig) -> int:
        if not rig.on_gpu:
            return 0
        return int(torch.cuda.current_stream().cuda_stream)


TUNED_TILE = MIB // 2
BOOK_BYTES = 32 * 12  # beside each stage: where its segments go


def tuning_shapes(slot_bytes: int, total_bytes: int) -> list[Any]:
    """Rings from few large stages to many small ones, up to all of a block's shared memory; tiles of some sizes."""
    limit = 225 * 1024
    shapes: dict[tuple[int, int, int], None] = {}
    for warps in (1, 2, 4, 8):
        for stage in (4096, 8192, 16384, 32768):
            stage_bytes = max(slot_bytes, stage // slot_bytes * slot_bytes)
            most = min(32, 128 // warps, limit // (warps * (stage_bytes + BOOK_BYTES)))
            if most >= 3 and stage_bytes <= 32 * slot_bytes:
                shapes |= {
                    (warps, stages, stage_bytes): None for stages in {most, max(3, most * 5 // 8), max(3, most // 3)}
                }
    tiles = max(1, total_bytes // (16 * 4 * TUNED_TILE))
    listed = [_kv.CopyConfig("bulk", 16, *shape, max(1, tiles * 4 // shape[0])) for shape in shapes]
    auto = _kv.select_copy_config(slot_bytes, total_bytes, _kv.Direction.EXPORT, 16)
    if auto.method == "bulk":
        usual = ("bulk", 16, auto.warps, auto.stages, auto.stage_bytes)
        listed += [_kv.CopyConfig(*usual, count) for count in (1, 2, 4, 16, 32)]
    return listed

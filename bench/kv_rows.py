"""Rows of bench.kv_transfer: what is run for a case, in which order, and what a row says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import kv_methods as methods
from bench.kv_methods import Move, NotHere
from bench.kv_rig import Rig, Tables
from bench.kv_shapes import MIB, Case
from bench.kv_timing import DecodeLoad, Job, Timing, beside_decode, measure
from specgen_engine.kv.native import _kv

DIRECTIONS = ("push", "pull")
TABLE_SETS = 4
TUNING_BATCH = 256 * MIB
TUNED_CHUNKS = (1 << 10, 2 << 10, 8 << 10, 32 << 10)
DECODE_CHUNKS = (2 << 10, 32 << 10)
DECODE_SMS = (4, 8, 16, 32)
DUTIES = (1.0, 0.1)


class RowMaker:
    """Measures the rows of one rig after another, keeping the ceilings and tuned shapes between them."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args = args
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
        for case in cases:
            sets = [rig.tables(case.pages) for _ in range(TABLE_SETS)]
            yield from self._ceiling_rows(rig, case, sets)
            for direction in DIRECTIONS:
                yield from self._ours(rig, case, direction, sets)
                if case.sms == 16:
                    yield from self._others(rig, case, direction, sets)
            if case.batch_bytes >= 16 * MIB or self.args.quick:
                yield self._both_ways(rig, case)
        if rig.on_gpu and rig.shape.name == "sweep" and rig.shape.chunk_bytes in DECODE_CHUNKS:
            yield from self._decode_rows(rig)

    def _row(
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
        moves = {direction: methods.copy_engine(rig, direction, size) for direction in DIRECTIONS}
        for direction in (*DIRECTIONS, "both"):
            jobs = [Job(moves[way], sets) for way in (DIRECTIONS if direction == "both" else (direction,))]
            timing = measure(rig, jobs)
            row = self._row(
                rig, case, "copy-engine", direction, timing, verified=self._contiguous_right(rig, direction, size)
            )
            self._ceilings[direction, size] = row["gbps"]
            yield row | {"of_ceiling": 1.0}

    def _contiguous_right(self, rig: Rig, direction: str, size: int) -> bool | None:
        if direction == "both":  # the two copies overwrite each other's source; each way is verified alone
            return None
        rig.pool.add_(1)
        before, pool = rig.snapshot(), rig.pool.clone()
        target, source = (before, pool) if direction == "push" else (pool, before)
        target[:size] = source[:size]
        methods.copy_engine(rig, direction, size)(rig.tables(1), torch.cuda.current_stream().cuda_stream)
        rig.synchronize()
        return torch.equal(rig.snapshot(), before) and torch.equal(rig.pool, pool)

    def _ours(self, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Iterator[dict[str, Any]]:
        names = ("auto", "bulk", "vector") if rig.on_gpu else ("auto",)
        auto = methods.config_for("auto", rig, direction, case.pages, case.sms)
        for name in names:
            config = methods.config_for(name, rig, direction, case.pages, case.sms)
            if name != "auto" and config.method == auto.method:
                continue
            yield self._ours_row(rig, case, f"ours-{name}", direction, sets, config)
        tuned = self._configs.get((direction, rig.arena.layout.slot_bytes))
        if tuned is not None:
            config = _kv.CopyConfig(tuned.method, case.sms, tuned.warps, tuned.stages, tuned.stage_bytes)
            yield self._ours_row(rig, case, "ours-tuned", direction, sets, config)

    def _ours_row(
        self, rig: Rig, case: Case, method: str, direction: str, sets: list[Tables], config: Any
    ) -> dict[str, Any]:
        move = methods.ours(rig, direction, config, lane=1)
        # An import can only find the tags right once the pages were exported.
        self._export_first(rig, sets)
        verified = self._verify(rig, direction, move, sets[0], tagged=True)
        timing = measure(rig, [Job(move, sets)])
        return self._row(rig, case, method, direction, timing, sms=config.sms, config=repr(config), verified=verified)

    def _others(self, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Iterator[dict[str, Any]]:
        size = case.pages * rig.shape.page_bytes
        makers: dict[str, Callable[[], Move]] = {"torch-index": lambda: methods.torch_index(rig, direction)}
        if rig.on_gpu:
            makers["copy-batch"] = lambda: methods.copy_batch(rig, direction, sets)
            makers["host-pinned"] = lambda: methods.host_pinned(rig, direction, size)
        for name, make in makers.items():
            yield self._other_row(rig, case, name, direction, sets, make)
        for quota in (2, 16):
            yield self._sgl_row(rig, case, direction, sets, quota)
        for name in methods.PEER_PACKAGES:
            missing = methods.peer_missing(name) or "importable, but this benchmark has no adapter for it yet"
            yield self._row(rig, case, name, direction, None, skipped=missing)

    def _other_row(
        self, rig: Rig, case: Case, name: str, direction: str, sets: list[Tables], make: Callable[[], Move]
    ) -> dict[str, Any]:
        try:
            move = make()
            right = (
                self._pinned_right(rig, case) if name == "host-pinned" else self._verify(rig, direction, move, sets[0])
            )
            timing = measure(rig, [Job(move, sets)])
        except NotHere as error:
            return self._row(rig, case, name, direction, None, skipped=str(error))
        except RuntimeError as error:
            return self._row(rig, case, name, direction, None, skipped=f"failed: {str(error).splitlines()[0]}")
        return self._row(rig, case, name, direction, timing, verified=right)

    def _pinned_right(self, rig: Rig, case: Case) -> bool:
        """Out and back: the pool's bytes return after the pool was changed."""
        size = case.pages * rig.shape.page_bytes
        rig.pool.add_(1)
        expected = rig.pool[:size].clone()
        for direction in DIRECTIONS:
            methods.host_pinned(rig, direction, size)(rig.tables(1), self._stream(rig))
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
            return self._row(rig, case, name, direction, None, skipped=str(error))
        except RuntimeError as error:
            return self._row(rig, case, name, direction, None, skipped=f"failed: {str(error).splitlines()[0]}")
        return self._row(rig, case, name, direction, timing, verified=verified)

    def _both_ways(self, rig: Rig, case: Case) -> dict[str, Any]:
        pages = min(case.pages, rig.pages // 2)
        halves = [[rig.tables(pages, part, 2) for _ in range(TABLE_SETS)] for part in range(2)]
        half = Case(case.shape, pages * case.shape.page_bytes, case.sms)
        configs = [methods.config_for("auto", rig, way, pages, case.sms) for way in DIRECTIONS]
        moves = [
            methods.ours(rig, way, config, lane) for way, config, lane in zip(DIRECTIONS, configs, (1, 2), strict=True)
        ]
        for sets in halves:
            self._export_first(rig, sets)
        verified = all(
            self._verify(rig, way, move, sets[0], tagged=True)
            for way, move, sets in zip(DIRECTIONS, moves, halves, strict=True)
        )
        timing = measure(rig, [Job(move, sets) for move, sets in zip(moves, halves, strict=True)])
        row = self._row(
            rig, half, "ours-auto", "both", timing, sms=2 * configs[0].sms, config=repr(configs[0]), verified=verified
        )
        ceiling = self._ceilings.get(("both", case.pages * case.shape.page_bytes))
        return row | {"of_ceiling": row["gbps"] / ceiling if ceiling else None}

    def _decode_rows(self, rig: Rig) -> Iterator[dict[str, Any]]:
        self._load = self._load or DecodeLoad(rig.device)
        case = Case(rig.shape, TUNING_BATCH, 16)
        sets = [rig.tables(case.pages) for _ in range(TABLE_SETS)]
        self._export_first(rig, sets)
        for direction in DIRECTIONS:
            for sms in DECODE_SMS:
                config = methods.config_for("auto", rig, direction, case.pages, sms)
                move = methods.ours(rig, direction, config, lane=3)
                verified = self._verify(rig, direction, move, sets[0], tagged=True)
                for duty in DUTIES:
                    slowdown, gbps = beside_decode(rig, Job(move, sets), self._load, duty)
                    row = self._row(
                        rig, case, "ours-auto+decode", direction, None, sms=sms, config=repr(config), verified=verified
                    )
                    us = case.pages * rig.shape.page_bytes / gbps / 1e3
                    yield row | {"gbps": gbps, "us": us, "decode_slowdown": slowdown, "duty": duty}

    def _tune(self, rig: Rig) -> Iterator[dict[str, Any]]:
        """Launch shapes at 16 SMs; the best of each direction serves the rows named ours-tuned."""
        slot = rig.arena.layout.slot_bytes
        case = Case(rig.shape, TUNING_BATCH, 16)
        sets = [rig.tables(case.pages) for _ in range(TABLE_SETS)]
        for direction in DIRECTIONS:
            best = 0.0
            for config in tuning_shapes(slot):
                row = self._ours_row(rig, case, "tune", direction, sets, config)
                yield row
                if row["verified"] and row["gbps"] > best:
                    best = row["gbps"]
                    self._configs[direction, slot] = config
                    self.tuned[f"{direction}/{slot}"] = repr(config)

    def _export_first(self, rig: Rig, sets: list[Tables]) -> None:
        config = methods.config_for("auto", rig, "push", len(sets[0]), 16)
        move = methods.ours(rig, "push", config, lane=1)
        for tables in sets:
            move(tables, self._stream(rig))
        rig.synchronize()

    def _verify(self, rig: Rig, direction: str, move: Move, tables: Tables, tagged: bool = False) -> bool:
        run = lambda given: move(given, self._stream(rig))  # noqa: E731
        return (rig.verify_push if direction == "push" else rig.verify_pull)(run, tables, tagged)

    @staticmethod
    def _stream(rig: Rig) -> int:
        if not rig.on_gpu:
            return 0
        return int(torch.cuda.current_stream().cuda_stream)


BOOK_BYTES = 32 * 12  # beside each stage: where its segments go


def tuning_shapes(slot_bytes: int) -> list[Any]:
    """Rings from few large stages to many small ones, as many as a block's shared memory holds."""
    limit = 225 * 1024
    listed = []
    for warps in (1, 2, 4, 8):
        for stage in (4096, 8192, 16384, 32768):
            stage_bytes = max(slot_bytes, stage // slot_bytes * slot_bytes)
            stages = min(16, limit // (warps * (stage_bytes + BOOK_BYTES)))
            config = (warps, stages, stage_bytes)
            if stages >= 3 and stage_bytes <= 32 * slot_bytes and config not in listed:
                listed.append(config)
    return [_kv.CopyConfig("bulk", 16, *config) for config in listed]

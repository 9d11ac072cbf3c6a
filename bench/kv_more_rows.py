"""Rows of bench.kv_transfer beside the plain ones: the transport's paths, peer libraries, both ways at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench import kv_methods as methods
from bench.kv_methods import Move, NotHere
from bench.kv_paths import STAGING_BYTES, Submitter
from bench.kv_rig import Rig, Tables
from bench.kv_shapes import KIB, MIB, Case
from bench.kv_timing import DecodeLoad, Job, beside_decode, measure, measure_calls
from specgen_engine.kv.native import _kv

if TYPE_CHECKING:
    from bench.kv_rows import RowMaker

Row = dict[str, Any]
DIRECTIONS = ("push", "pull")
MOST_ENGINE_ENTRIES = 2048
LEAST_STAGED = 16 * MIB
HEADLINE, LARGEST = 200 * MIB, 800 * MIB
OTHER_STAGINGS = (32 * MIB, 128 * MIB)
BOTH_WAYS_CHUNKS = (2 * KIB, 32 * KIB)
DECODE_SMS = (2, 4, 8, 16)
BOTH_WAYS_SMS = (8, 12, 32, 64)
# Fewer bytes in flight than one way alone wants: with both ways on the link they queue, and hold each other up.
RINGS = {
    "vector": ("vector", 16, 32, 0, 0),
    "4x3": ("bulk", 16, 4, 3, 8192),
    "2x3": ("bulk", 16, 2, 3, 8192),
    "2x4": ("bulk", 16, 2, 4, 8192),
    "6x2x4": ("bulk", 6, 2, 4, 8192),
}


class PathCase(NamedTuple):
    name: str
    path: Any
    staging_bytes: int = 0
    engines: int = 2


def path_rows(maker: RowMaker, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Iterator[Row]:
    """CudaCopier.submit by each path: on the device's clock, and on the host's from call to arrival."""
    size = case.pages * rig.shape.page_bytes
    staged = size >= LEAST_STAGED and rig.shape.layout == "page_first" and rig.shape.page_bytes <= STAGING_BYTES // 4
    wanted = [PathCase("staged", _kv.CopyPath.STAGED, STAGING_BYTES)] if staged else []
    if case.sms == 16:
        wanted.append(PathCase("direct", _kv.CopyPath.DIRECT))
        if case.pages * len(rig.planes) <= MOST_ENGINE_ENTRIES:
            wanted.append(PathCase("engine", _kv.CopyPath.ENGINE))
        if staged and size > HEADLINE and rig.shape.chunk_bytes in BOTH_WAYS_CHUNKS:
            wanted += [PathCase(f"staged/{b // MIB}M", _kv.CopyPath.STAGED, b) for b in OTHER_STAGINGS]
            wanted.append(PathCase("staged/1-engine", _kv.CopyPath.STAGED, STAGING_BYTES, 1))
    for path_case in wanted:
        yield from _submitted(maker, rig, case, direction, sets, path_case)
    if staged and size > HEADLINE and rig.shape.chunk_bytes in BOTH_WAYS_CHUNKS:
        in_runs = [rig.run_tables(case.pages) for _ in sets]
        for path_case in (
            PathCase("staged-runs", _kv.CopyPath.STAGED, STAGING_BYTES),
            PathCase("staged-runs/128M", _kv.CopyPath.STAGED, 128 * MIB),
        ):
            yield from _submitted(maker, rig, case, direction, in_runs, path_case)
    if case.sms == 16 and case.pages * len(rig.planes) <= MOST_ENGINE_ENTRIES:
        yield _called_batch(maker, rig, case, direction, sets)


def _submitted(
    maker: RowMaker, rig: Rig, case: Case, direction: str, sets: list[Tables], how: PathCase
) -> Iterator[Row]:
    maker.export_first(rig, sets)
    submitter = Submitter(rig, direction, how.path, sets, case.sms, how.staging_bytes, how.engines)
    verified = maker.verify(rig, direction, submitter.call(), sets[0], tagged=True)
    config = f"path={how.path.name}, staging_bytes={how.staging_bytes}, engines={how.engines}"
    more = {"sms": case.sms, "config": config, "verified": verified}
    if how.path != _kv.CopyPath.DIRECT:
        timing = measure(rig, [Job(submitter.queued(), sets)])
        yield maker.row(rig, case, f"ours-{how.name}", direction, timing, **more)
    if case.sms == 16 and "/" not in how.name:
        timing = measure_calls(Job(submitter.bare_call(), sets))
        yield maker.row(rig, case, f"call-{how.name}", direction, timing, **more | {"clock": "host"})


def decode_rows_staged(
    maker: RowMaker, rig: Rig, case: Case, direction: str, sets: list[Tables], load: DecodeLoad
) -> Iterator[Row]:
    """What staged copies cost a decode step: the copy engine carries, but packing needs SMs and memory bandwidth."""
    size = case.pages * rig.shape.page_bytes
    for sms in DECODE_SMS:
        submitter = Submitter(rig, direction, _kv.CopyPath.STAGED, sets, sms)
        verified = maker.verify(rig, direction, submitter.call(), sets[0], tagged=True)
        slowdown, gbps = beside_decode(rig, Job(submitter.queued(), sets), load, 1.0)
        row = maker.row(rig, case, "ours-staged+decode", direction, None, sms=sms, verified=verified)
        yield row | {"gbps": gbps, "us": size / gbps / 1e3, "decode_slowdown": slowdown, "duty": 1.0}


def _called_batch(maker: RowMaker, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Row:
    """cudaMemcpyBatchAsync by the host's clock: what its entries cost to enqueue is in."""
    stream = torch.cuda.current_stream()
    batch = methods.copy_batch(rig, direction, sets)

    def call(tables: Tables, _: int) -> None:
        batch(tables, stream.cuda_stream)
        stream.synchronize()

    verified = maker.verify(rig, direction, call, sets[0])
    timing = measure_calls(Job(call, sets))
    return maker.row(rig, case, "call-copy-batch", direction, timing, verified=verified, clock="host")


def peer_rows(maker: RowMaker, rig: Rig, case: Case, direction: str, sets: list[Tables]) -> Iterator[Row]:
    """NIXL and Mooncake with the same page tables, by the host's clock until the bytes have arrived."""
    assert maker.peers is not None
    for name in maker.peers.wanted:
        try:
            move = maker.peers.mover(name, rig, direction, sets)
            with rig.looking_at(maker.peers.running[name].far.base):
                verified = maker.verify(rig, direction, move, sets[0])
            timing = measure_calls(Job(move, sets))
        except NotHere as error:
            yield maker.row(rig, case, name, direction, None, skipped=str(error), clock="host")
        except Exception as error:  # a foreign library may raise anything: its row says what
            said = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            yield maker.row(rig, case, name, direction, None, skipped=said, clock="host")
        else:
            yield maker.row(rig, case, name, direction, timing, verified=verified, clock="host")


Maker = Callable[[Rig, str, list[Tables]], tuple[Move, Move]]  # a mover to verify, and one to time


def both_rows(maker: RowMaker, rig: Rig, case: Case) -> Iterator[Row]:
    """A push and a pull at once, of disjoint pages."""
    pages = min(case.pages, rig.pages // 2)
    halves = [[rig.tables(pages, part, 2) for _ in range(4)] for part in range(2)]
    half = Case(case.shape, pages * case.shape.page_bytes, case.sms)
    for sets in halves:
        maker.export_first(rig, sets)
    for name, ways, sms in _both_ways(rig, half):
        movers = [make(rig, way, sets) for make, way, sets in zip(ways, DIRECTIONS, halves, strict=True)]
        verified = all(
            maker.verify(rig, way, to_verify, sets[0], tagged=True)
            for (to_verify, _), way, sets in zip(movers, DIRECTIONS, halves, strict=True)
        )
        timing = measure(rig, [Job(timed, sets) for (_, timed), sets in zip(movers, halves, strict=True)])
        yield maker.row(rig, half, name, "both", timing, sms=2 * sms, verified=verified)


def _both_ways(rig: Rig, case: Case) -> Iterator[tuple[str, tuple[Maker, Maker], int]]:
    """(row's name, how to push and how to pull, SMs each way)."""
    yield "ours-auto", (_by_kernel(case, "auto", 16, 1), _by_kernel(case, "auto", 16, 2)), 16
    if not rig.on_gpu or case.batch_bytes <= HEADLINE or rig.shape.chunk_bytes not in BOTH_WAYS_CHUNKS:
        return
    for sms in BOTH_WAYS_SMS:
        yield f"ours-auto/{sms}", (_by_kernel(case, "auto", sms, 1), _by_kernel(case, "auto", sms, 2)), sms
        yield f"ours-vector/{sms}", (_by_kernel(case, "vector", sms, 1), _by_kernel(case, "vector", sms, 2)), sms
    for push, pull in itertools.product(RINGS, repeat=2) if case.batch_bytes > LARGEST else ():
        yield f"ours-{push}-{pull}", (_by_ring(push, 1), _by_ring(pull, 2)), 16
    if rig.shape.layout == "page_first":
        yield "ours-staged-push", (_staged(16), _by_kernel(case, "auto", 16, 2)), 16
        yield "ours-staged-push/vector-pull", (_staged(16), _by_kernel(case, "vector", 16, 2)), 16
        yield "ours-staged-pull", (_by_kernel(case, "auto", 16, 1), _staged(16)), 16
        yield "ours-staged-both", (_staged(16), _staged(16)), 16


def _by_ring(name: str, lane: int) -> Maker:
    def make(rig: Rig, direction: str, sets: list[Tables]) -> tuple[Move, Move]:
        slot = rig.arena.layout.slot_bytes
        method, sms, warps, stages, stage_bytes = RINGS[name]
        config = _kv.CopyConfig(method, sms, warps, stages, max(slot, stage_bytes) if method == "bulk" else 0)
        move = methods.ours(rig, direction, config, lane)
        return move, move

    return make


def _by_kernel(case: Case, method: str, sms: int, lane: int) -> Maker:
    def make(rig: Rig, direction: str, sets: list[Tables]) -> tuple[Move, Move]:
        config = methods.config_for(method, rig, direction, case.pages, sms)
        move = methods.ours(rig, direction, config, lane)
        return move, move

    return make


def _staged(sms: int) -> Maker:
    def make(rig: Rig, direction: str, sets: list[Tables]) -> tuple[Move, Move]:
        submitter = Submitter(rig, direction, _kv.CopyPath.STAGED, sets, sms)
        return submitter.call(), submitter.queued()

    return make

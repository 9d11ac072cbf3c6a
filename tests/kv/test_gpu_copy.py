"""The kernels on a GPU: every byte, every tag, both layouts, all methods. One GPU alone lends to itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from specgen_engine.kv.base import PageRefs, StalePages
from specgen_engine.kv.native import _kv

pytestmark = pytest.mark.gpu(count=1)

MIB = 1 << 20
SHAPES = {
    "single": (32768,),
    "layers": (2048,) * 12,
    "one-kib": (1024,) * 7,
    "mla-index": (73728,) * 3 + (8448,) * 3,
    "odd": (1152, 1152, 528),
}
CONFIGS = {
    "auto": None,
    "vector": ("vector", 5, 8, 0, 0),
    "bulk-narrow": ("bulk", 3, 1, 3, 8192),
    "bulk-wide": ("bulk", 16, 8, 3, 8192),
    "bulk-one-block": ("bulk", 1, 4, 6, 8192),
    "bulk-in-turn": ("bulk", 5, 3, 4, 8192, 5),
    "bulk-paced": ("bulk", 4, 4, 4, 8192, 2, 20.0),
}


def _current_stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


@pytest.fixture(scope="module")
def lender() -> Iterator[Any]:
    from bench.kv_rig import LenderProcess

    device = 1 if _kv.device_count() > 1 else 0
    with LenderProcess("cuda", device, 2, 64) as process:
        yield process


@pytest.fixture(params=["page_first", "layer_first"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=SHAPES)
def rig(request: pytest.FixtureRequest, lender: Any, layout: str) -> Iterator[Any]:
    from bench.kv_rig import Rig
    from bench.kv_shapes import Shape

    made = Rig("cuda:0", lender, 2, Shape(request.param, SHAPES[request.param], layout), 8 * MIB, seed=7)
    yield made
    made.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_byte_and_tag_both_ways(rig: Any, name: str) -> None:
    import torch

    stream = torch.cuda.current_stream().cuda_stream
    for pages in (1, 3, rig.pages // 2):
        tables = rig.tables(pages)
        for direction, verify in ((_kv.Direction.EXPORT, rig.verify_push), (_kv.Direction.IMPORT, rig.verify_pull)):
            given = CONFIGS[name]
            config = _kv.CopyConfig(*given) if given else rig.copier.select(direction, pages)
            assert verify(lambda t, d=direction, c=config: rig.copier.launch(d, t.addresses(), c, stream), tables, True)


@pytest.mark.parametrize("path", ["DIRECT", "ENGINE", "STAGED"])
def test_every_path_moves_every_byte_and_tag(rig: Any, path: str) -> None:
    from bench.kv_paths import Submitter

    sets = [rig.tables(pages) for pages in (1, 3, rig.pages // 2)] + [rig.sequential_tables(rig.pages // 2)]
    for staging_pages in (4, 40):  # pieces of one page, and of ten
        staging = staging_pages * rig.shape.page_bytes
        for way, verify in (("push", rig.verify_push), ("pull", rig.verify_pull)):
            if path == "STAGED" and rig.shape.layout == "layer_first":
                with pytest.raises(ValueError, match="path=STAGED: the arena must be page-first"):
                    Submitter(rig, way, _kv.CopyPath.STAGED, sets, 16, staging)
                continue
            call = Submitter(rig, way, getattr(_kv.CopyPath, path), sets, 16, staging).call()
            for tables in sets:
                assert verify(lambda t, c=call: c(t, _current_stream()), tables, True)


def test_a_mixed_transfer_moves_every_byte_and_reports_stale_pages_in_the_callers_order(rig: Any) -> None:
    if rig.shape.layout == "layer_first":
        pytest.skip("pages of a layer-first arena are never staged")
    copier = _kv.CudaCopier(rig.arena.layout, rig.base, 0, 16, 0.0, 10_000, 8 * rig.shape.page_bytes)
    rig.arena.export(range(rig.pages), rig.refs).result()
    count = rig.pages // 2
    tables = rig.tables(count)
    device, arena, generations = (column.cpu().numpy() for column in tables[:3])
    packed = _kv.plan_staging(arena, rig.arena.layout.pages_per_chunk, 2, count * rig.shape.page_bytes >> 20)[2]
    assert 0 < packed < count, "8 MiB of random small pages have more runs than their bytes allow"
    wrong = np.zeros(count, np.uint64)
    wrong[::3] = 1
    ticket = copier.submit(
        _kv.Direction.IMPORT, device, arena, generations.view(np.uint64) + wrong, 0, _kv.CopyPath.STAGED
    )
    assert copier.wait(ticket, 10_000)
    assert (copier.take_flags(ticket) == np.where(wrong == 1, _kv.PAGE_STALE, _kv.PAGE_MATCHES)).all()


def test_a_pace_is_kept_by_the_direct_path_alone(rig: Any) -> None:
    copier = _kv.CudaCopier(rig.arena.layout, rig.base, 0, 16, 50.0, 10_000, 8 * rig.shape.page_bytes)
    columns = [column.cpu().numpy() for column in rig.tables(2)[:3]]
    with pytest.raises(ValueError, match=r"max_gbps=50: only CopyPath\.DIRECT keeps a pace"):
        copier.submit(_kv.Direction.EXPORT, columns[0], columns[1], columns[2].view(np.uint64), 0, _kv.CopyPath.ENGINE)


def test_import_reports_exactly_the_stale_pages(rig: Any) -> None:
    import torch

    from bench.kv_rig import Tables

    rig.arena.export(range(rig.pages), rig.refs).result()
    tables = rig.tables(min(rig.pages, 40))
    wrong = torch.zeros(len(tables), dtype=torch.bool, device="cuda:0")
    wrong[::3] = True
    changed = Tables(tables.device_pages, tables.arena_pages, tables.generations + wrong, tables.flags)
    config = rig.copier.select(_kv.Direction.IMPORT, len(tables))
    rig.copier.launch(_kv.Direction.IMPORT, changed.addresses(), config, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert torch.equal(changed.flags == _kv.PAGE_STALE, wrong)
    assert torch.equal(changed.flags == _kv.PAGE_MATCHES, ~wrong)


def test_a_captured_graph_moves_the_pages_of_its_tables_at_replay(rig: Any) -> None:
    import torch

    tables = rig.tables(min(rig.pages // 2, 30))
    config = rig.copier.select(_kv.Direction.EXPORT, len(tables))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rig.copier.launch(_kv.Direction.EXPORT, tables.addresses(), config, torch.cuda.current_stream().cuda_stream)
    for _ in range(2):
        fresh = rig.tables(len(tables))
        for column, new in zip(tables, fresh, strict=True):
            column.copy_(new)
        assert rig.verify_push(lambda _: graph.replay(), tables, True)


def test_a_pace_is_kept(rig: Any) -> None:
    import torch

    tables = rig.tables(rig.pages // 2)
    moved, marks = len(tables) * rig.shape.page_bytes, [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for method in (("vector", 4, 8, 0, 0, 1, 5.0), ("bulk", 4, 4, 4, 8192, 1, 5.0)):
        marks[0].record()
        rig.copier.launch(
            _kv.Direction.EXPORT,
            tables.addresses(),
            _kv.CopyConfig(*method),
            torch.cuda.current_stream().cuda_stream,
        )
        marks[1].record()
        torch.cuda.synchronize()
        gbps = moved / marks[0].elapsed_time(marks[1]) / 1e6
        assert 2.0 < gbps < 6.5


def test_token_indices_are_taken_as_sglang_keeps_them(rig: Any) -> None:
    import torch

    page_size, tables = 16, rig.tables(5)

    def tokens(pages: Any) -> Any:
        return (pages[:, None] * page_size + torch.arange(page_size, device="cuda:0")).reshape(-1).contiguous()

    device, arena = tokens(tables.device_pages), tokens(tables.arena_pages)
    addresses = _kv.DeviceTables(
        device.data_ptr(),
        arena.data_ptr(),
        tables.generations.data_ptr(),
        tables.flags.data_ptr(),
        5,
        index_stride=page_size,
    )
    config = rig.copier.select(_kv.Direction.EXPORT, 5)
    stream = torch.cuda.current_stream().cuda_stream
    assert rig.verify_push(lambda _: rig.copier.launch(_kv.Direction.EXPORT, addresses, config, stream), tables, True)


def test_submitted_copies_follow_the_callers_stream_and_lead_it(rig: Any) -> None:
    import torch

    stream = torch.cuda.Stream()
    rig.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        rig.pool.add_(3)
        export = rig.arena.export(range(rig.pages), rig.refs, after_stream=stream.cuda_stream)
        rig.copier.order_after(export.ticket, stream.cuda_stream)
        expected = rig.pool.clone()
        rig.pool.zero_()
        back = rig.arena.import_(range(rig.pages), rig.refs, after_stream=stream.cuda_stream)
    export.result()
    back.result()
    torch.cuda.synchronize()
    assert torch.equal(rig.pool, expected)


def test_an_arena_page_of_another_generation_raises(rig: Any) -> None:
    rig.arena.export(range(rig.pages), rig.refs).result()
    first = rig.refs.take(slice(0, 2))
    rig.arena.release(first)
    again = rig.arena.allocate(2)
    with pytest.raises(StalePages):
        rig.arena.import_([0, 1], again).result()  # given out anew, nothing exported to it yet
    with pytest.raises(StalePages):
        rig.arena.import_([0, 1], first)
    kept = rig.refs.take(slice(2, None))
    rig.refs = PageRefs(*(np.concatenate(columns) for columns in zip(kept, again, strict=True)))


@pytest.mark.gpu(count=2)
def test_promises_under_failure_hold_on_two_gpus(tmp_path: Any) -> None:
    from bench.kv_failures import main

    assert main(["--json", str(tmp_path / "failures.json"), "--mib", "256"]) == 0

"""Which layers one launch of a restore moves, and what a forward waits for."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.kv.base import PageRefs
from specgen_engine.kv.native import _kv
from specgen_engine.tier import movers
from specgen_engine.tier.base import PageShape
from specgen_engine.tier.metrics import Stats
from specgen_engine.tier.movers import FIRST_BYTES, arrivals_of, choose_plan, launch_groups, launch_plans

QWEN3_8B_LAYER = 4096  # bytes of a token in one of 36 layers


@given(st.integers(1, 200), st.integers(1, 200))
def test_every_layer_is_moved_once_and_in_order(layers: int, first: int) -> None:
    groups = launch_groups(layers, min(first, layers))
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert len(groups[0]) == min(first, layers)
    assert all(len(group) <= 2 * len(groups[0]) for group in groups)


@given(st.integers(1, 200), st.integers(1, 1 << 34))
def test_the_forward_can_begin_early_and_no_more_launches_are_made_than_that_takes(
    layers: int, layer_bytes: int
) -> None:
    plans = launch_plans(layers)
    chosen = choose_plan(plans, layer_bytes)
    assert all(len(groups[0]) * layer_bytes > FIRST_BYTES for groups in plans[:chosen])
    assert len(plans[chosen][0]) * layer_bytes <= FIRST_BYTES or plans[chosen] is plans[-1]
    assert [len(groups) for groups in plans] == sorted(len(groups) for groups in plans)


@pytest.mark.parametrize(("tokens", "launches"), [(2_000, 1), (8_000, 3), (16_000, 5), (32_000, 5), (64_000, 10)])
def test_short_prefixes_come_by_few_launches(tokens: int, launches: int) -> None:
    plans = launch_plans(36)
    assert len(plans[choose_plan(plans, tokens * QWEN3_8B_LAYER)]) == launches


class Recorder:
    """In place of a device's events: what was recorded, and who waited for it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.stream = 0

    def event(self, layer: int) -> Any:
        return SimpleNamespace(record=lambda: self.log.append(("record", layer)), query=lambda: True, number=layer)

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_event=lambda event: self.log.append(("wait", event.number)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    import_module("tests.tier.support")  # first: SGLang as its CPU engine is started, or a skip
    from sglang.srt.managers import cache_controller

    one = Recorder()
    layers = iter(range(10**6))
    module = SimpleNamespace(Event=lambda: one.event(next(layers)), current_stream=one.current_stream)
    monkeypatch.setattr(cache_controller, "device_module", module)
    return one


def counter(recorder: Recorder, groups: list[range]) -> Any:
    """A counter whose load has begun; its layers' events have the numbers of their layers."""
    from specgen_engine.tier.events import LaunchCounter

    mover = SimpleNamespace(arrivals=arrivals_of(groups))
    one = LaunchCounter(groups[-1].stop, mover, lambda: recorder.stream)
    for number, event in enumerate(one.events[0].load_events):
        event.number = number
        event.record = lambda number=number: recorder.log.append(("record", number))
    assert one.update_producer() == 0
    for layer in range(groups[-1].stop):
        one.events[0].complete(layer)
    return one


def test_each_launch_is_recorded_once_and_waited_for_once_by_each_stream(recorder: Recorder) -> None:
    one = counter(recorder, [range(2), range(2, 6), range(6, 7)])
    assert recorder.log == [("record", 1), ("record", 5), ("record", 6)]
    recorder.log.clear()
    one.set_consumer(0)
    for layer in range(7):
        one.wait_until(layer)  # K
        one.wait_until(layer)  # V
    recorder.stream = 1
    one.wait_until(2)
    assert recorder.log == [("wait", 1), ("wait", 5), ("wait", 6), ("wait", 5)]


def test_a_later_forward_waits_anew_and_one_without_a_load_does_not(recorder: Recorder) -> None:
    one = counter(recorder, [range(3)])
    for _ in range(2):
        recorder.log.clear()
        one.set_consumer(0)
        one.wait_until(1)
        assert recorder.log == [("wait", 2)]
    recorder.log.clear()
    one.set_consumer(-1)
    one.wait_until(1)
    assert recorder.log == []


class FakeTorch:
    """torch, but its GPU is this CPU: streams run what they are given at once, events have always happened."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            Event=lambda **_: SimpleNamespace(
                record=lambda _stream=None: None, query=lambda: True, elapsed_time=lambda _end: 2.0
            ),
            Stream=lambda *_a, **_k: SimpleNamespace(cuda_stream=0),
            current_stream=lambda _device=None: SimpleNamespace(cuda_stream=0),
            stream=lambda _stream: nullcontext(),
        )

    def device(self, *_arguments: Any) -> torch.device:
        return torch.device("cpu")

    def empty(self, *shape: Any, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        return torch.empty(*shape, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class FakeCopier:
    """Notes its launches and leaves the flags that `matches` says."""

    def __init__(self, planes: tuple[int, int], log: list[Any], matches: list[int]) -> None:
        self._planes, self._log, self._matches = planes, log, matches

    def select(self, _direction: Any, pages: int) -> int:
        return pages

    def launch(self, _direction: Any, tables: Any, config: int, _stream: int, _lane: int) -> None:
        self._log.append((self._planes, list_at(tables.pages, config), list_at(tables.arena, config)))
        flags = (ctypes.c_int32 * config)(*self._matches)
        ctypes.memmove(tables.flags, flags, ctypes.sizeof(flags))


def list_at(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CudaMover of 12 layers, 2 planes each, without a GPU; what it launches is in `log`."""
    names = ("pages", "arena", "generations", "flags", "count", "stride")
    kv = SimpleNamespace(
        DeviceTables=lambda *values: SimpleNamespace(**dict(zip(names, values, strict=True))),
        select_planes=lambda _layout, first, count: (first, count),
        Direction=_kv.Direction,
        PAGE_MATCHES=_kv.PAGE_MATCHES,
    )
    monkeypatch.setattr(movers, "_kv", kv)
    monkeypatch.setattr(movers, "torch", FakeTorch())
    one = SimpleNamespace(log=[], matches=[_kv.PAGE_MATCHES] * 3, stats=Stats())
    backend = SimpleNamespace(device=0, copier=lambda planes, _base: FakeCopier(planes, one.log, one.matches))
    reserved: list[bool] = []
    tags = SimpleNamespace(reserve=lambda: reserved.append(True))
    arena: Any = SimpleNamespace(backend=backend, layout=None, space=SimpleNamespace(base=0), tags=tags)
    shape = PageShape([_kv.Plane(0, 1024, 1024)] * 24, 2, 1)
    one.mover = movers.CudaMover(shape, arena, one.stats)
    one.mover.prepare(None, 3)
    assert reserved
    return one


def restored(fake: Any, pages: list[int], arena_pages: list[int]) -> list[Any]:
    """The holds of an import of all layers, which has ended."""
    held: Any = SimpleNamespace(
        refs=PageRefs(np.array(arena_pages), np.arange(len(pages)).astype(np.uint64)), finish_when=lambda _ended: None
    )
    fake.mover.begin_import(torch.tensor(pages), [held])
    for layer in range(12):
        fake.mover.import_layer(layer)
    return [planes for planes, *_ in fake.log]


def test_a_restore_moves_every_plane_of_the_same_pages_once(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert restored(fake, [7, 3, 5], [1, 9, 4]) == [(0, 24)]
    assert list(fake.mover.arrivals) == [11] * 12
    assert fake.log[0][1:] == ([7, 3, 5], [1, 9, 4])
    fake.log.clear()
    monkeypatch.setattr(movers, "choose_plan", lambda plans, _bytes: len(plans) - 1)
    assert restored(fake, [7, 3, 5], [1, 9, 4]) == [(0, 4), (4, 8), (12, 8), (20, 4)]
    assert list(fake.mover.arrivals) == [1, 1, *[5] * 4, *[9] * 4, *[11] * 2]
    fake.mover.settle()
    assert fake.stats.counts["restore_seconds"] == pytest.approx(2 * 0.002)
    assert fake.stats.counts["late_mismatched_pages"] == 0


def test_a_page_that_changed_while_it_was_read_is_counted(fake: Any) -> None:
    fake.matches[1] = _kv.PAGE_MATCHES + 1
    restored(fake, [7, 3, 5], [1, 9, 4])
    fake.mover.settle()
    assert fake.stats.counts["late_mismatched_pages"] == 1

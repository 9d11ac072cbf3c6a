"""Spans of a search against an in-memory exporter: what lies under what, when, and what a trace level leaves out."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specgen_engine.observability.spans import SpanBook, span_book_of
from tests.controller.fakes import Rig, fake_manager, module


class Recorder:
    """A book whose spans end in memory, under one request span as SGLang makes it."""

    def __init__(self, level: int = 3) -> None:
        self.memory = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.memory))
        self.request = provider.get_tracer("sglang").start_span("request")
        context = trace.set_span_in_context(self.request)
        self.book = SpanBook(provider.get_tracer("specgen"), lambda rid: context, lambda: level)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.memory.get_finished_spans() if span.name == f"specgen.{name}"]


def one_search(recorder: Recorder, **options: Any) -> Any:
    """A fork that is slow, then one that is accepted while a third still runs."""

    async def body() -> Any:
        rig = Rig(publish=recorder.book.on_event, per_search=3, **options)
        rig.engine.say("reasoning on")
        for n, at in enumerate((4, 8, 12), 1):
            rig.trigger(at)
            await rig.settle()
            if n < 3:
                rig.fork(n, module(f"k{n}"))
                await rig.settle()
        rig.pool.judge("k1", 1.1)
        await rig.settle()
        rig.pool.judge("k2", 2.0)
        await rig.end()
        return rig.session.record

    return asyncio.run(body())


def test_a_search_is_a_tree_of_spans_under_sglangs_request() -> None:
    recorder = Recorder()
    record = one_search(recorder)
    (search,) = recorder.named("search")
    forks = recorder.named("fork")
    stages = recorder.named("compile")
    assert search.parent is not None
    assert search.parent.span_id == recorder.request.get_span_context().span_id
    assert len({span.context.trace_id for span in recorder.memory.get_finished_spans()}) == 1
    assert {fork.parent.span_id for fork in forks if fork.parent} == {search.context.span_id}
    by_number = {fork.attributes["specgen.n"]: fork for fork in forks if fork.attributes}
    assert {n: fork.attributes["specgen.state"] for n, fork in by_number.items() if fork.attributes} == {
        1: "stop", 2: "stop", 3: "cancelled",
    }  # fmt: skip
    assert [stage.parent.span_id for stage in stages if stage.parent] == [
        by_number[1].context.span_id, by_number[2].context.span_id,
    ]  # fmt: skip
    assert [stage.attributes["specgen.speedup"] for stage in stages if stage.attributes] == [1.1, 2.0]
    assert search.attributes is not None
    assert search.attributes["specgen.ended_by"] == "criterion"
    assert search.attributes["specgen.accepted"] == record.accepted["hash"]
    assert [event.name for event in search.events] == ["verdict", "verdict"]


def test_times_are_the_searchs_own() -> None:
    recorder = Recorder()
    record = one_search(recorder)
    (search,) = recorder.named("search")
    assert search.start_time == int(record.created * 1e9)
    assert 0 <= search.end_time - (record.created + record.wall_s) * 1e9 < 50e6
    for span in (*recorder.named("fork"), *recorder.named("compile")):
        assert search.start_time <= span.start_time <= span.end_time <= search.end_time


@pytest.mark.parametrize(("level", "wanted"), [(0, set()), (1, {"search", "fork"}), (2, {"search", "fork", "compile"})])
def test_the_trace_level_says_how_much(level: int, wanted: set[str]) -> None:
    recorder = Recorder(level)
    one_search(recorder)
    assert {span.name.removeprefix("specgen.") for span in recorder.memory.get_finished_spans()} == wanted


def test_a_search_that_never_started_forks_still_ends_its_span() -> None:
    async def body(recorder: Recorder) -> None:
        rig = Rig(publish=recorder.book.on_event)
        rig.engine.say("<think>no</think>nothing", {"type": "stop"})
        await rig.end()

    recorder = Recorder()
    asyncio.run(body(recorder))
    assert len(recorder.named("search")) == 1
    assert recorder.book._open == recorder.book._waiting == {}


def test_without_the_flag_there_is_no_book() -> None:
    assert span_book_of(fake_manager(enable_trace=False)) is None
    assert span_book_of(fake_manager(enable_trace=True)) is not None

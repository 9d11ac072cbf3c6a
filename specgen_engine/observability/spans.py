"""OpenTelemetry spans of searches, under SGLang's own flags (--enable-trace, --otlp-traces-endpoint, /set_trace_level).

    specgen.search > specgen.fork > specgen.compile, specgen.check, specgen.time

SGLang sets up the provider and its exporter; the spans here are made from the same events as the live view, with the
times of the search. A search is a child of SGLang's span of its base request, so that one trace shows both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STAGES = ("compile", "check", "time")
FORKS_LEVEL, STAGES_LEVEL = 1, 2

ParentOf = Callable[[str], Any]


@dataclass(slots=True)
class _Open:
    """The spans of one running search: its own, those of its forks by number, one stage a candidate by its hash."""

    search: Any
    created: float
    level: int
    forks: dict[int, Any] = field(default_factory=dict)
    ended_forks: dict[int, Any] = field(default_factory=dict)
    writers: dict[str, int | None] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    judged: set[str] = field(default_factory=set)

    def ns(self, t: float) -> int:
        return int((self.created + t) * 1e9)


class SpanBook:
    """Turns a feed's events into spans.

    tracer: of the opentelemetry API. parent_of: search id -> the context to start under, or None. level: SGLang's trace
    level when a search starts: 0 none, 1 searches and forks, 2 and above the stages too.
    """

    def __init__(self, tracer: Any, parent_of: ParentOf, level: Callable[[], int]) -> None:
        self._tracer, self._parent_of, self._level = tracer, parent_of, level
        self._open: dict[str, _Open] = {}
        self._waiting: dict[str, dict[str, Any]] = {}

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        """Never raises for an event out of order: it is then no span."""
        search = data["search"]
        if kind == "started":
            self._waiting[search] = data
            return
        if search in self._waiting:  # by now SGLang has made the span of the base request
            self._start(search, self._waiting.pop(search))
        spans = self._open.get(search)
        if spans is None:
            return
        if kind == "fork":
            self._fork(spans, data)
        elif kind == "stage":
            self._stage(spans, data)
        elif kind == "candidate":
            self._candidate(spans, data)
        elif kind == "ended":
            self._end(spans, data)
            del self._open[search]

    def _start(self, search: str, data: dict[str, Any]) -> None:
        level = self._level()
        if level <= 0:
            return
        names = ("task", "task_hash", "trigger", "termination", "trace", "iteration", "prompt_tokens")
        span = self._span("specgen.search", self._parent_of(search), int(data["created"] * 1e9), data, names)
        span.set_attribute("specgen.search", search)
        self._open[search] = _Open(span, data["created"], level)

    def _fork(self, spans: _Open, data: dict[str, Any]) -> None:
        fork, number = data["fork"], data["fork"]["n"]
        if fork["state"] == "running":
            names = ("n", "trigger", "at_token", "input_tokens")
            spans.forks[number] = self._span(
                "specgen.fork", _under(spans.search), spans.ns(fork["started_s"]), fork, names
            )
        elif (span := spans.forks.pop(number, None)) is not None:
            _set(span, fork, ("state", "tokens", "prefix_reused", "prefix_computed", "candidate"))
            span.end(spans.ns(data["t"]))
            spans.ended_forks[number] = span

    def _stage(self, spans: _Open, data: dict[str, Any]) -> None:
        candidate, now = data["hash"], spans.ns(data["t"])
        if candidate in spans.judged or spans.level < STAGES_LEVEL:
            return
        if (before := spans.stages.pop(candidate, None)) is not None:
            before.end(now)
        if data["stage"] in STAGES:
            writer = spans.writers.get(candidate)
            parent = spans.forks.get(writer or 0) or spans.ended_forks.get(writer or 0) or spans.search
            spans.stages[candidate] = self._span(f"specgen.{data['stage']}", _under(parent), now, data, ("hash",))

    def _candidate(self, spans: _Open, data: dict[str, Any]) -> None:
        candidate = data["candidate"]
        name = candidate["hash"]
        spans.writers.setdefault(name, candidate["forks"][0] if candidate["forks"] else None)
        if candidate["status"] is None:
            return
        spans.judged.add(name)
        names = ("status", "speedup", "reason", "sandbox", "device")
        if (span := spans.stages.pop(name, None)) is not None:
            _set(span, candidate, names)
            span.end(spans.ns(data["t"]))
        attributes = {f"specgen.{key}": candidate[key] for key in ("hash", *names) if candidate[key] is not None}
        spans.search.add_event("verdict", attributes, spans.ns(data["t"]))

    def _end(self, spans: _Open, data: dict[str, Any]) -> None:
        now = spans.ns(data["t"])
        for span in (*spans.stages.values(), *spans.forks.values()):
            span.set_attribute("specgen.state", "cancelled")
            span.end(now)
        _set(spans.search, data, ("ended_by", "reason", "reasoning_tokens", "fork_tokens", "answer_tokens"))
        if data.get("accepted"):
            _set(spans.search, {"accepted": data["accepted"]["hash"], **data["accepted"]}, ("accepted", "speedup"))
        spans.search.end(now)

    def _span(self, name: str, context: Any, start_ns: int, data: dict[str, Any], attributes: tuple[str, ...]) -> Any:
        span = self._tracer.start_span(name, context=context, start_time=start_ns)
        _set(span, data, attributes)
        return span


def _set(span: Any, data: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if (value := data.get(name)) is not None:
            span.set_attribute(f"specgen.{name}", value)


def _under(span: Any) -> Any:
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)


def span_book_of(manager: Any) -> SpanBook | None:
    """The book of a TokenizerManager whose server traces; None without --enable-trace."""
    if not manager.server_args.enable_trace:
        return None
    from opentelemetry import trace
    from sglang.srt.observability.trace import get_global_trace_level

    def parent_of(rid: str) -> Any:
        state = manager.rid_to_state.get(rid)
        return getattr(getattr(getattr(state, "time_stats", None), "trace_ctx", None), "root_span_context", None)

    return SpanBook(trace.get_tracer("specgen"), parent_of, get_global_trace_level)

"""With --enable-trace a search's spans reach the OTLP endpoint, in the trace of SGLang's own request."""

from __future__ import annotations

from tests.live.collector import attributes
from tests.live.conftest import Live


def test_a_searchs_spans_arrive_under_sglangs_request(live: Live) -> None:
    record = live.search(name="traced")
    spans = live.collector.wait(
        lambda spans: any(attributes(s).get("specgen.search") == record["id"] for s in spans if "search" in s.name)
    )
    (search,) = [span for span in spans if attributes(span).get("specgen.search") == record["id"]]
    mine = [span for span in spans if span.trace_id == search.trace_id]
    by_id = {span.span_id: span for span in mine}
    parent = by_id.get(search.parent_span_id)
    assert parent is not None, "SGLang's span of the request is not in this trace"
    assert not parent.name.startswith("specgen.")
    forks = [span for span in mine if span.name == "specgen.fork"]
    assert len(forks) == len(record["forks"])
    assert {fork.parent_span_id for fork in forks} == {search.span_id}
    stages = {name: [s for s in mine if s.name == f"specgen.{name}"] for name in ("compile", "check", "time")}
    assert all(stages.values()), {name: len(found) for name, found in stages.items()}
    assert {by_id[one.parent_span_id].name for found in stages.values() for one in found} <= {
        "specgen.fork", "specgen.search",
    }  # fmt: skip
    assert attributes(search)["specgen.ended_by"] == record["ended_by"]

"""/specgen/* as any client sees it: keys as SGLang's, what is described is what comes, a feed that can be rejoined."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings

from specgen_engine.controller import http as routes
from specgen_engine.controller.schemas import Searches, SearchView
from specgen_engine.observability.feed import Feed
from tests.controller.fakes import ended_record, fake_controller
from tests.controller.site import Site, app_of, running_site

LIST, ONE, FORK, EVENTS, PAGE = (
    "GET /specgen/searches", "GET /specgen/searches/a", "POST /specgen/searches/a/fork",
    "GET /specgen/events?follow=false", "GET /specgen/",
)  # fmt: skip
ROUTES = (LIST, ONE, FORK, EVENTS, PAGE, "GET /specgen/openapi.json")


def controller_with_history() -> Any:
    controller = fake_controller()
    controller.history["a"] = ended_record()
    return controller


def asked(client: TestClient, route: str, token: str | None) -> int:
    method, path = route.split(" ")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return client.request(method, path, headers=headers).status_code


@pytest.mark.parametrize("route", ROUTES)
def test_without_keys_every_route_is_open_and_with_an_api_key_none_is(route: str) -> None:
    usual = 404 if route == FORK else 200
    assert asked(TestClient(app_of(controller_with_history())), route, None) == usual
    locked = TestClient(app_of(controller_with_history(), api_key="user"))
    assert asked(locked, route, None) == 401
    assert asked(locked, route, "other") == 401
    assert asked(locked, route, "user") == usual


@pytest.mark.parametrize("route", [LIST, EVENTS, PAGE])
def test_what_shows_every_search_needs_the_admin_key_where_there_is_one(route: str) -> None:
    both = TestClient(app_of(controller_with_history(), api_key="user", admin_api_key="admin"))
    assert [asked(both, route, token) for token in (None, "user", "admin")] == [401, 401, 200]
    admin_only = TestClient(app_of(controller_with_history(), admin_api_key="admin"))
    assert [asked(admin_only, route, token) for token in (None, "admin")] == [401, 200]


@pytest.mark.parametrize("route", [ONE, FORK])
def test_a_client_reaches_its_own_search_with_the_api_key(route: str) -> None:
    both = TestClient(app_of(controller_with_history(), api_key="user", admin_api_key="admin"))
    assert asked(both, route, None) == 401
    assert asked(both, route, "user") != 401


def test_answers_are_what_the_description_says() -> None:
    client = TestClient(app_of(controller_with_history()))
    Searches.model_validate(client.get("/specgen/searches").json())
    SearchView.model_validate(client.get("/specgen/searches/a").json())
    whole = SearchView.model_validate(client.get("/specgen/searches/a?ids=true").json())
    assert whole.ids is not None
    assert whole.candidates[0].speedup == 2.0
    paths = client.get("/specgen/openapi.json").json()["paths"]
    assert set(paths) == {
        "/specgen/", "/specgen/events", "/specgen/openapi.json", "/specgen/searches", "/specgen/searches/{search}",
        "/specgen/searches/{search}/fork",
    }  # fmt: skip


def test_ids_come_when_asked_for_and_a_search_that_is_unknown_is_a_404() -> None:
    client = TestClient(app_of(controller_with_history()))
    assert "ids" not in client.get("/specgen/searches/a").json()
    assert client.get("/specgen/searches/a?ids=true").json()["ids"] is not None
    assert client.get("/specgen/searches/a?ids=perhaps").status_code in (400, 422)
    for missing in (client.get("/specgen/searches/b"), client.post("/specgen/searches/b/fork")):
        assert missing.status_code == 404
        assert "no search 'b'" in missing.text


def test_a_fork_is_asked_of_a_search_that_reasons_and_refused_by_any_other() -> None:
    def ended() -> int:
        raise ValueError("search a is ended: only a running reasoning can be forked")

    controller = controller_with_history()
    controller.sessions["a"] = SimpleNamespace(ask_for_fork=lambda: 41)
    controller.sessions["b"] = SimpleNamespace(ask_for_fork=ended)
    client = TestClient(app_of(controller))
    assert client.post("/specgen/searches/a/fork").json() == {"search": "a", "length": 41}
    refused = client.post("/specgen/searches/b/fork")
    assert refused.status_code == 409
    assert "only a running reasoning" in refused.text


def test_a_snapshot_holds_the_latest_of_the_searches_that_ended() -> None:
    controller = fake_controller()
    for number in range(routes.ENDED_SHOWN + 3):
        controller.history[str(number)] = ended_record(str(number))
    shown = [row["id"] for row in routes.snapshot_of(controller)["searches"]]
    assert shown == [str(number) for number in range(3, routes.ENDED_SHOWN + 3)]


def test_an_answer_with_a_field_that_is_not_described_is_none_of_ours() -> None:
    listing = TestClient(app_of(controller_with_history())).get("/specgen/searches").json()
    with pytest.raises(ValueError, match="Extra inputs"):
        Searches.model_validate({**listing, "more": 1})


DESCRIBED = schemathesis.openapi.from_asgi("/specgen/openapi.json", app_of(controller_with_history()))


@DESCRIBED.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_described_request_breaks_the_server(case: schemathesis.Case) -> None:
    if case.path == "/specgen/events":
        case.query = {**(case.query or {}), "follow": "false"}  # a followed stream never ends
    answer = case.call()
    assert answer.status_code < 500
    if answer.status_code != 422:  # SGLang's app answers 400 there; see tests/live
        case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])


def test_the_page_loads_nothing_from_elsewhere() -> None:
    answer = TestClient(app_of(fake_controller())).get("/specgen/")
    text = answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "innerHTML" not in text


# ---- events


class Reader:
    """A client of /specgen/events that reads event by event."""

    def __init__(self, site: Site, last_id: str | None = None) -> None:
        self.client = httpx.Client(timeout=10)
        headers = {"Last-Event-ID": last_id} if last_id else {}
        request = self.client.build_request("GET", f"{site.url}/specgen/events", headers=headers)
        self.answer = self.client.send(request, stream=True)
        self.lines = self.answer.iter_lines()

    def block(self) -> dict[str, str]:
        """The next event's fields, or those of a comment under ""."""
        fields: dict[str, str] = {}
        for line in self.lines:
            if not line:
                return fields
            name, _, value = line.partition(": ")
            fields[name] = value
        raise EOFError

    def event(self) -> tuple[str, dict[str, Any], str]:
        for _ in range(50):  # comments between events
            block = self.block()
            if "event" in block:
                return block["event"], json.loads(block["data"]), block["id"]
        raise AssertionError("no event came")

    def close(self) -> None:
        self.answer.close()
        self.client.close()


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site(controller_with_history(), heartbeat_s=0.2) as one:
        yield one


def test_a_reader_gets_a_snapshot_and_then_what_happens(site: Site) -> None:
    reader = Reader(site)
    assert reader.answer.headers["content-type"].startswith("text/event-stream")
    kind, data, _ = reader.event()
    assert kind == "snapshot"
    assert [(row["id"], row["candidates"][0]["status"]) for row in data["searches"]] == [("a", "correct")]
    site.publish(1, 2)
    assert [reader.event()[1]["n"] for _ in range(2)] == [1, 2]
    reader.close()


def test_a_reader_that_comes_back_misses_nothing_and_sees_nothing_twice(site: Site) -> None:
    reader = Reader(site)
    reader.event()
    site.publish(1, 2, 3)
    reader.event()
    position = reader.event()[2]
    reader.close()
    site.publish(4)
    again = Reader(site, position)
    assert [again.event()[1]["n"] for _ in range(2)] == [3, 4]
    again.close()


@pytest.mark.parametrize("position", ["deadbeef-1", "1", "", "x-y", "{epoch}-999", "{epoch}--1", "{epoch}-٣"])
def test_a_position_that_is_not_ours_starts_with_a_snapshot(site: Site, position: str) -> None:
    site.publish(1)
    text = position.format(epoch=site.controller.feed.epoch)
    if not text.isascii():
        assert site.controller.feed.after(text) is None
        return
    reader = Reader(site, text)
    assert reader.event()[0] == "snapshot"
    reader.close()


def test_a_position_that_the_ring_has_left_behind_starts_with_a_snapshot(site: Site) -> None:
    site.controller.feed = Feed(size=2)
    feed = site.controller.feed
    assert feed.after(feed.position(0)) == 0
    site.publish(1, 2, 3, 4)
    assert feed.after(feed.position(1)) is None
    assert feed.after(feed.position(2)) == 2


def test_silence_is_filled_with_comments(site: Site) -> None:
    reader = Reader(site)
    reader.event()
    assert reader.block() == {"": "alive"}
    assert reader.block() == {"": "alive"}
    reader.close()


def test_a_reader_that_does_not_read_costs_nothing_and_gets_a_snapshot_when_it_does() -> None:
    controller = controller_with_history()
    feed = controller.feed = Feed(size=64)
    tail = "x" * 20_000
    with running_site(controller) as site:
        address = urlsplit(site.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as slow:
            slow.sendall(b"GET /specgen/events HTTP/1.1\r\nHost: x\r\n\r\n")
            while b"event: snapshot" not in slow.recv(1 << 16):
                pass
            for _ in range(20):  # 40 MB, far more than the sockets' buffers hold
                site.call(lambda: [feed.publish("progress", {"search": "a", "tail": tail}) for _ in range(100)])
                time.sleep(0.01)
            assert len(feed._ring) == 64
            text, got = b"", 0
            while b"event: snapshot" not in text:
                text = text[-200:] + slow.recv(1 << 20)
                got += len(text)
        assert got < 2000 * len(tail)


def test_readers_are_counted_and_one_too_many_is_told_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "READERS", 1)
    reader = Reader(site)
    reader.event()
    refused = httpx.get(f"{site.url}/specgen/events")
    assert refused.status_code == 429
    assert "1 readers" in refused.text
    assert httpx.get(f"{site.url}/specgen/events?follow=false").status_code == 200
    reader.close()
    for _ in range(100):
        if site.controller.feed.readers == 0:
            break
        time.sleep(0.05)
    assert site.controller.feed.readers == 0


def test_without_following_it_ends_with_what_is_known(site: Site) -> None:
    site.publish(1, 2)
    text = httpx.get(f"{site.url}/specgen/events?follow=false").text
    assert text.count("event: snapshot") == 1
    assert "event: progress" not in text
    after = httpx.get(
        f"{site.url}/specgen/events?follow=false", headers={"Last-Event-ID": site.controller.feed.position(1)}
    ).text
    assert after.count("event: progress") == 1

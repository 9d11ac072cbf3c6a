"""bench.kv_tier's measuring against a stand-in for the server: an LRU of prefixes, with delays by level."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.kv_tier import Bench, run
from bench.kv_tier_check import compared
from bench.kv_tier_client import SUFFIX, Answer, Client
from bench.kv_tier_decode import measure_under_decode
from bench.kv_tier_measure import Plan, alone_prefixes, measure_alone, measure_at_once
from bench.kv_tier_plot import plot
from bench.kv_tier_searches import measure_searches
from bench.kv_tier_servers import gpu_beside, pool_tokens

PLAN = Plan(
    (128, 256, 512), rounds=2, crowd=4, crowd_tokens=128, decodes=2, decode_tokens=400, loaded_tokens=128, pairs=3,
    window_s=0.6, pace_s=0.15, searches=1, steps=1, search_tokens=128,
)  # fmt: skip
POOL = pool_tokens(max(PLAN.prefixes))
LATE_S = 3.0
DELAY_S = {"recompute": 0.02, "tier": 0.008, "device": 0.001}


class Engine:
    """Prefixes whole or not at all; what falls out of the pool is in the tier from then on."""

    def __init__(self) -> None:
        self.device: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.tier: set[tuple[int, ...]] = set()
        self.aborted = threading.Event()
        self.flushes = self.asked = 0
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def find(self, ids: list[int]) -> str:
        prefix = tuple(ids[:-SUFFIX])
        with self.lock:
            self.asked += 1
            level = "device" if prefix in self.device else "tier" if prefix in self.tier else "recompute"
            self.device[prefix] = None
            self.device.move_to_end(prefix)
            self.tier.add(prefix)
            while sum(map(len, self.device)) > POOL:
                self.device.popitem(last=False)
        return level


class Handler(BaseHTTPRequestHandler):
    engine: Engine

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path == "/flush_cache":
            self.engine.flushes += 1
            return self.answer({})
        if self.path == "/abort_request":
            self.engine.aborted.set()
            return self.answer({})
        if body.get("stream"):
            self.send_response(200)
            self.end_headers()
            for _ in range(body["sampling_params"]["max_new_tokens"]):
                if self.engine.aborted.wait(0.05):
                    return
                self.wfile.write(b'data: {"text": "x"}\n\n')
                self.wfile.flush()
            return
        level = self.engine.find(body["input_ids"])
        time.sleep(DELAY_S[level] + self.engine.delay_s)
        prefix = len(body["input_ids"]) - SUFFIX
        details = {"device": prefix * (level == "device"), "host": prefix * (level == "tier")}
        self.answer({"output_ids": [1], "meta_info": {"cached_tokens": prefix, "cached_tokens_details": details}})

    def do_GET(self) -> None:
        self.answer({"internal_states": [{}]})

    def answer(self, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def stand_in(engine: Engine) -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("One", (Handler,), {"engine": engine}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(f"http://127.0.0.1:{server.server_port}", 1_000)
    server.shutdown()
    server.server_close()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def client(engine: Engine) -> Iterator[Client]:
    with stand_in(engine) as one:
        yield one


def test_alone_each_length_is_measured_at_every_level(client: Client) -> None:
    notes: list[str] = []
    prefixes, filler = alone_prefixes(PLAN, 7)
    for prefix in (*prefixes.values(), filler):
        client.ask(prefix)
    rows = measure_alone(client, "peer", PLAN, 7, notes)
    found = {(row["level"], row["prefix_tokens"]): row for row in rows}
    assert set(found) == {(level, n) for level in ("peer", "own") for n in PLAN.prefixes}
    assert notes == []
    for length in PLAN.prefixes:
        assert found["peer", length]["ttft_ms"] >= 1e3 * DELAY_S["tier"]
        assert len(found["peer", length]["ttft_ms_all"]) == PLAN.rounds
    assert found["peer", 512]["gbps"] is None, "the stand-in counts no loads"


def test_many_at_once_and_beside_decodes(client: Client, tmp_path: Path) -> None:
    notes: list[str] = []
    rows = measure_at_once(client, "peer", PLAN, 7, notes)
    assert [row["complete"] for row in rows] == [4, 4, 4, 4]
    rows += measure_under_decode(client, "peer", PLAN, 7, notes)
    beside = next(row for row in rows if row["load"] == "2 decodes" and row["level"] == "peer")
    assert beside["decode_slowdown"] == pytest.approx(0, abs=0.5)
    assert len(beside["decode_tokens_per_s"]["alone"]) == PLAN.pairs
    assert all(10 < one <= 45 for one in beside["decode_tokens_per_s"]["alone"])
    machine = {"gpu": None, "gpus": 0}
    report = {"rows": rows, "machine": machine, "attention_backend": "none", "commit": "none"}
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_searches_are_timed_whole_or_by_what_they_took_at_least(client: Client, engine: Engine) -> None:
    plan = PLAN._replace(searches=2, steps=2)
    (row,) = measure_searches(client, "peer", plan, 7, [])
    assert (row["requests"], row["requests_asked"], row["at_least_s"]) == (12, 12, None)
    assert row["wall_s"] > 0
    assert engine.flushes == 1
    assert not engine.aborted.is_set()
    client.until = time.monotonic() + 0.3
    engine.delay_s = 0.2
    (row,) = measure_searches(client, "peer", plan, 8, [])
    assert 0 < row["requests"] < row["requests_asked"] == 12
    assert (row["wall_s"], row["computed_tokens"]) == (None, None)
    assert row["at_least_s"] >= 0.3
    assert engine.asked == 12 + 6, "nothing is begun after the end"
    assert engine.aborted.is_set()


class NotedBench(Bench):
    """Notes what is added to its report, in order."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.added: list[str] = []

    def add(self, rows: list[dict[str, Any]], what: str) -> None:
        self.added.append(what)
        super().add(rows, what)


def come_up(future: Future[Client], client: Client) -> None:
    time.sleep(LATE_S)
    future.set_result(client)


def report_of(tmp_path: Path, wanted: list[str], seconds: float, late: str) -> tuple[dict[str, Any], list[str]]:
    """A run on three stand-ins, one of which comes up late: its report, and what was added to it, in order."""
    report: dict[str, Any] = {"rows": [], "notes": [], "seed": 7}
    with ExitStack() as stack, ThreadPoolExecutor(1) as threads:
        up = {level: stack.enter_context(stand_in(Engine())) for level in ("peer", "off", "host")}
        starting: dict[str, Future[Client]] = {level: Future() for level in up}
        for level, client in up.items():
            if level == late:
                threads.submit(come_up, starting[level], client)
            else:
                starting[level].set_result(client)
        deadline = time.monotonic() + seconds
        bench = NotedBench(report, tmp_path / "report.json", PLAN, deadline)
        run(bench, starting, PLAN, wanted, deadline)
    return report, bench.added


@pytest.mark.parametrize("late", ["off", pytest.param("host", marks=pytest.mark.slow)])
def test_a_server_that_starts_late_holds_up_nobody_until_the_quiet_part(late: str, tmp_path: Path) -> None:
    report, added = report_of(tmp_path, ["crowd", "alone", "searches"], 300, late)
    lanes, quiet = added[:4], added[4:]
    assert set(lanes) == {"peer, prewarm", "off, searches", "host, searches", "host, prewarm"}
    assert lanes[-1].split(",")[0] == late
    assert lanes.index("host, searches") < lanes.index("host, prewarm")
    assert quiet == ["peer, crowd", "host, crowd", "peer, alone", "host, alone", "peer, searches"]
    assert {row["server"] for row in report["rows"] if row["load"] == "1 searches"} == {"peer", "off", "host"}
    assert {row["server"] for row in report["rows"] if row["level"] == "recompute"} == {"peer"}
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == report["rows"]


def test_what_no_time_is_left_for_is_noted_and_what_is_not_wanted_is_not_computed(tmp_path: Path) -> None:
    report, added = report_of(tmp_path, ["crowd", "decodes"], 20, late="")
    assert added == ["peer, crowd", "host, crowd"]
    assert [note for note in report["notes"] if "decodes" in note] == [
        "peer, decodes: not run, the time was over",
        "host, decodes: not run, the time was over",
    ]
    assert not any("searches" in note for note in report["notes"])


@pytest.mark.parametrize(("gpus", "serving", "lender"), [(1, 0, 0), (2, 0, 1), (2, 1, 0), (4, 0, 1)])
def test_the_lender_takes_a_gpu_that_does_not_serve_where_there_is_one(
    gpus: int, serving: int, lender: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": gpus}.items():
        monkeypatch.setattr(f"pynvml.{name}", lambda value=value: value)
    assert gpu_beside(serving) == lender


def test_answers_of_two_backends_part_where_the_first_ones_token_led_least() -> None:
    first = [Answer(0.0, [1, 2, 3], 0, 0, (0.5, 0.25, 0.75)), Answer(0.0, [4, 5, 6], 0, 0, (0.5, 0.001, 0.25))]
    found = [first[0]._replace(leads=()), Answer(0.0, [4, 7, 8], 0, 0)]
    assert compared(first, found) == {"equal": 1, "leads_where_parted": [0.001], "lead_median": 0.5}
    assert compared(first, first)["leads_where_parted"] == []

"""bench.kv_tier's measuring against a stand-in for the server: an LRU of prefixes, with delays by level."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.kv_tier_client import SUFFIX, Client
from bench.kv_tier_decode import measure_under_decode
from bench.kv_tier_measure import Plan, alone_prefixes, measure_alone, measure_at_once
from bench.kv_tier_plot import plot
from bench.kv_tier_servers import gpu_beside, pool_tokens

PLAN = Plan(
    (128, 256, 512), rounds=2, crowd=4, crowd_tokens=128, decodes=2, decode_tokens=400, loaded_tokens=128, pairs=3,
    window_s=0.6, pace_s=0.15, searches=1, steps=1, search_tokens=128,
)  # fmt: skip
POOL = pool_tokens(max(PLAN.prefixes))
DELAY_S = {"recompute": 0.02, "tier": 0.008, "device": 0.001}


class Engine:
    """Prefixes whole or not at all; what falls out of the pool is in the tier from then on."""

    def __init__(self) -> None:
        self.device: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.tier: set[tuple[int, ...]] = set()
        self.aborted = threading.Event()
        self.lock = threading.Lock()

    def find(self, ids: list[int]) -> str:
        prefix = tuple(ids[:-SUFFIX])
        with self.lock:
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
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
        time.sleep(DELAY_S[level])
        prefix = len(body["input_ids"]) - SUFFIX
        details = {"device": prefix * (level == "device"), "host": prefix * (level == "tier")}
        self.answer({"output_ids": [1], "meta_info": {"cached_tokens": prefix, "cached_tokens_details": details}})

    def do_GET(self) -> None:
        self.answer({})

    def answer(self, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def client() -> Iterator[Client]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("One", (Handler,), {"engine": Engine()}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(f"http://127.0.0.1:{server.server_port}", 1_000)
    server.shutdown()
    server.server_close()


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


@pytest.mark.parametrize(("gpus", "serving", "lender"), [(1, 0, 0), (2, 0, 1), (2, 1, 0), (4, 0, 1)])
def test_the_lender_takes_a_gpu_that_does_not_serve_where_there_is_one(
    gpus: int, serving: int, lender: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": gpus}.items():
        monkeypatch.setattr(f"pynvml.{name}", lambda value=value: value)
    assert gpu_beside(serving) == lender

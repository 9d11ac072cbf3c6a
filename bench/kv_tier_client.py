"""One server, as bench.kv_tier talks to it."""

from __future__ import annotations

import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from specgen_engine.errors import SpecGenError

VOCABULARY = (1_000, 40_000)
SUFFIX = 8
METRICS = (
    *("sglang:load_back_tokens_total", "sglang:load_back_duration_seconds_sum"),
    *("specgen_kv_restore_seconds_total", "specgen_kv_admission_seconds_total"),
    *("specgen_kv_check_seconds_total", "specgen_kv_launch_seconds_total"),
)


class Answer(NamedTuple):
    """`seconds` from sending to the answer's end; `device` and `tier`: prompt tokens by where their KV was.

    leads: by how much each token's log-probability is above the next best one's, where that was asked for.
    """

    seconds: float
    ids: list[int]
    device: int
    tier: int
    leads: tuple[float, ...] = ()


class Loads(NamedTuple):
    """Loads of the second level since the server's start. `seconds`: on the load stream, first byte to last.

    The tier's scheduler counts what it spends on them itself (None elsewhere): admission_s, and of it check_s on
    holding pages and comparing tags, launch_s on launches.
    """

    tokens: int
    seconds: float
    admission_s: float | None = None
    check_s: float | None = None
    launch_s: float | None = None

    def since(self, before: Loads) -> Loads:
        own = [
            None if now is None or then is None else now - then for now, then in zip(self[2:], before[2:], strict=True)
        ]
        return Loads(self.tokens - before.tokens, self.seconds - before.seconds, *own)


class Decodes:
    """Long generations in the background; `rate()` is tokens a second since the last call."""

    def __init__(self, client: Client, count: int, tokens: int) -> None:
        self._tokens = [0] * count
        self._at = time.monotonic()
        self._seen = 0
        self._threads = [
            threading.Thread(target=self._run, args=(client, i, tokens), daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client: Client, index: int, tokens: int) -> None:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": random_ids(1_000 + index, 64), "sampling_params": params, "stream": True}
        with httpx.stream("POST", f"{client.url}/generate", json=body, timeout=600) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and "[DONE]" not in line:
                    self._tokens[index] += 1

    @property
    def alive(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def rate(self) -> float:
        now, total = time.monotonic(), sum(self._tokens)
        rate = (total - self._seen) / (now - self._at)
        self._at, self._seen = now, total
        return rate

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


class Client:
    """`bytes_per_token` of KV, as the server's pool has them."""

    def __init__(self, url: str, bytes_per_token: int) -> None:
        self.url = url
        self.bytes_per_token = bytes_per_token
        self.until = math.inf  # by time.monotonic(): what is measured on it ends then
        self._suffix = 0
        self._http = httpx.Client(timeout=600)

    def ask(self, prefix: list[int], tokens: int = 1, suffix: int | None = None, leads: bool = False) -> Answer:
        """Greedy, with a suffix of its own unless its number is given. Raises SpecGenError when the server refuses."""
        self._suffix += 1
        ids = prefix + random_ids(10**6 + (self._suffix if suffix is None else suffix), SUFFIX)
        return self.ask_ids(ids, tokens, leads)

    def ask_ids(self, ids: list[int], tokens: int, leads: bool = False) -> Answer:
        """Greedy, exactly this prompt. Raises SpecGenError when the server refuses."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": leads, "top_logprobs_num": 2 * leads}
        start = time.perf_counter()
        response = self._http.post(f"{self.url}/generate", json=body)
        seconds = time.perf_counter() - start
        if not response.is_success:
            raise SpecGenError(f"{self.url}: {response.status_code} {response.text[:300]}")
        answer = response.json()
        about = answer["meta_info"]
        details = about.get("cached_tokens_details") or {}
        device = details.get("device", about.get("cached_tokens", 0))
        best = about["output_top_logprobs"] if leads else ()
        ahead = tuple(first[0] - second[0] for first, second in best)
        return Answer(seconds, answer["output_ids"], device, details.get("host", 0), ahead)

    def ask_all(self, prefixes: list[list[int]]) -> tuple[list[Answer], float]:
        """At once; (answers, seconds until the last)."""
        with ThreadPoolExecutor(len(prefixes)) as threads:
            start = time.perf_counter()
            answers = list(threads.map(lambda prefix: self.ask(prefix), prefixes))
            return answers, time.perf_counter() - start

    def flush(self) -> None:
        for _ in range(50):
            if self._http.post(f"{self.url}/flush_cache").is_success:
                return
            time.sleep(0.1)
        raise SpecGenError(f"{self.url}: the cache can't be flushed: requests are still running")

    def abort(self) -> None:
        self._http.post(f"{self.url}/abort_request", json={"rid": "", "abort_all": True})

    def loads(self) -> Loads:
        """By SGLang's own counts, the same on every server; a CPU has no timed events, there the tier's are read."""
        sums: dict[str, float] = {}
        for line in self._http.get(f"{self.url}/metrics").text.splitlines():
            name, _, value = line.partition("{")
            if name in METRICS and value:
                sums[name] = sums.get(name, 0.0) + float(value.rsplit(" ", 1)[1])
        tokens, seconds, restored, *own = (sums.get(name) for name in METRICS)
        return Loads(int(tokens or 0), seconds or restored or 0.0, *own)

    def loads_of(self, before: Loads, tokens: int, wait_s: float = 1.0) -> Loads:
        """Since `before`, once `tokens` have been counted: the scheduler counts a load a step after it has ended."""
        end = time.monotonic() + wait_s
        while (found := self.loads().since(before)).tokens < tokens and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def tier_state(self) -> Any:
        return self._http.get(f"{self.url}/server_info").json()["internal_states"][0].get("specgen_kv")


def random_ids(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(*VOCABULARY) for _ in range(count)]

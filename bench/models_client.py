"""A server as bench.models talks to it: chats that are searched, plain generations, accounts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from specgen_engine.errors import SpecGenError

TASK = Path(__file__).parents[1] / "specgen_engine/replay/bundled/cpu_row_softmax/task.py"


class Generated(NamedTuple):
    """`logprobs`: of each output token. `first`: the likeliest first tokens with theirs. `cached`: prompt tokens from
    the cache, of which `restored` came from the second level. `seconds`: from sending to the end."""

    ids: list[int]
    logprobs: list[float]
    first: dict[int, float]
    cached: int
    restored: int
    seconds: float


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self._http = httpx.Client(timeout=240, limits=httpx.Limits(max_connections=128))

    def generate(self, ids: Sequence[int], tokens: int, logprobs: bool = True) -> Generated:
        """Greedy, past end tokens. Raises SpecGenError when the server refuses."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body: dict[str, Any] = {"input_ids": list(ids), "sampling_params": params}
        if logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": 8, "logprob_start_len": -1}
        start = time.perf_counter()
        answer = self._checked(self._http.post(f"{self.url}/generate", json=body))
        seconds = time.perf_counter() - start
        meta = answer["meta_info"]
        values = [float(one[0]) for one in meta.get("output_token_logprobs") or ()]
        first = {int(one[1]): float(one[0]) for one in (meta.get("output_top_logprobs") or [[]])[0]}
        details = meta.get("cached_tokens_details") or {}
        return Generated(
            answer["output_ids"], values, first, meta.get("cached_tokens", 0), details.get("host", 0), seconds
        )

    def search(self, prompt: str, tokens: int, settings: dict[str, Any], seconds: float = 240) -> str:
        """A chat that is searched, to its end; the search's id. Raises SpecGenError, httpx.TimeoutException."""
        answer = self._checked(self._http.post(f"{self.url}/v1/chat/completions", json=_chat(prompt, tokens, settings),
                                               timeout=seconds))  # fmt: skip
        return str(answer["sglext"]["specgen"]["id"])

    def record(self, search: str) -> dict[str, Any]:
        """A search that has ended, with its ids."""
        for _ in range(200):
            record: dict[str, Any] = self._get(f"/specgen/searches/{search}?ids=true")
            if record["state"] == "ended" and all(fork["finished_s"] is not None for fork in record["forks"]):
                return record
            time.sleep(0.1)
        raise SpecGenError(f"{self.url}: search {search} has not ended: {record['state']}")

    def flush(self) -> None:
        for _ in range(100):
            if self._http.post(f"{self.url}/flush_cache").is_success:
                return
            time.sleep(0.05)
        raise SpecGenError(f"{self.url}: the cache can't be flushed: requests are still running")

    def state(self) -> dict[str, Any]:
        """The scheduler's own account: memory, retractions, the tier's books. Counts are those of all replicas."""
        states: list[dict[str, Any]] = self._get("/server_info")["internal_states"]
        wanted = ("memory_usage", "specgen", "specgen_kv", "avg_spec_accept_length")
        state = {key: states[0][key] for key in wanted if key in states[0]}
        if len(states) > 1:
            own = [one["specgen"] for one in states]
            counts = ("free_tokens", "watched", "scripts", "forks_retracted", "ordinary_retracted")
            state["specgen"] = {**own[0], **{name: sum(one[name] for one in own) for name in counts}}
        return state

    def _get(self, path: str) -> Any:
        return self._checked(self._http.get(self.url + path))

    def _checked(self, response: httpx.Response) -> Any:
        if not response.is_success:
            raise SpecGenError(f"{self.url}: {response.status_code} {response.text[:300]}")
        return response.json()


def _chat(prompt: str, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    search = {"task": TASK.read_text(), "termination": "none", **settings}
    return {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "chat_template_kwargs": {"thinking": True, "enable_thinking": True},
        "custom_params": {"specgen": json.dumps(search)},
    }


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Their results, all made at once."""
    with ThreadPoolExecutor(max(1, len(calls))) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]

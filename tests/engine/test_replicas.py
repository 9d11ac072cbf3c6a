"""Two replicas behind SGLang's data-parallel controller: a search, its forks and its messages keep to one of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.conftest import TASK, Client, StartServer
from tests.engine.test_fork_kv import tokens_of

SEARCH = {
    "task": TASK + "\n# not recorded\n", "trigger": "every:12", "termination": "none", "fork": {"max_tokens": 10}
}  # fmt: skip
SEARCHES = 4


def searched(client: Client) -> list[tuple[list[Any], dict[str, Any]]]:
    """(ids of the forks, record) of searches that ran at once."""
    client.chat("warm", SEARCH, max_tokens=4)
    with ThreadPoolExecutor(SEARCHES) as threads:
        prompts = [f"Number {number} is nice, tell me about it." for number in range(SEARCHES)]
        answers = list(threads.map(lambda prompt: client.chat(prompt, SEARCH, max_tokens=56), prompts))
    return [tokens_of(answer, client)[1:] for answer in answers]


def watched(client: Client) -> list[int]:
    """Searches that each replica's scheduler looks after, fewest first."""
    return sorted(one["specgen"]["watched"] for one in client.get("/server_info").json()["internal_states"])


def asked_by_http(client: Client) -> tuple[list[int], dict[str, Any]]:
    """What is watched while one search runs, and its record, with a fork that is asked for by HTTP alone."""
    search = {**SEARCH, "trigger": "every:100000"}
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(client.chat, "Say more.", search, max_tokens=3_000)
        asked = False
        while not running.done() and not asked:
            now = [one for one in client.get("/specgen/searches").json()["searches"] if one["state"] == "reasoning"]
            asked = bool(now) and client.post(f"/specgen/searches/{now[0]['id']}/fork").is_success
        return watched(client), tokens_of(running.result(), client)[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_keeps_to_one_replica(start_server: StartServer) -> None:
    with start_server("--tiny", "--dp-size", "2", "--specgen-fork-per-search", "8", "--enable-metrics") as client:
        found = searched(client)
        assert sorted(record["replica"] for _, record in found) == [0, 0, 1, 1]
        compared = 0
        for forks, record in found:
            for ids, fork in zip(forks, record["forks"], strict=True):
                assert fork["replica"] == record["replica"] or not fork["tokens"]
                if fork["state"] not in ("stop", "length"):
                    continue
                # All but the newest token, whose KV is not written yet: on the other replica it would be the prompt's.
                assert fork["prefix_reused"] >= fork["prompt_tokens"] + fork["at_token"] - 2
                client.flush()
                fresh = client.generate(ids["input_ids"], len(ids["output_ids"]))
                assert fresh["meta_info"]["cached_tokens"] == 0
                assert fresh["output_ids"] == ids["output_ids"]
                compared += 1
        assert compared >= 8
        ordinary = {client.generate([5, 6, 7, last], 2)["meta_info"]["dp_rank"] for last in range(4)}
        assert ordinary == {0, 1}
        seen, record = asked_by_http(client)
        assert seen == [0, 1]
        assert [fork["replica"] for fork in record["forks"]] == [record["replica"]]
        states = [one["specgen"] for one in client.get("/server_info").json()["internal_states"]]
        assert sorted(state["replica"] for state in states) == [0, 1]
        assert [state["watched"] for state in states] == [0, 0]
        metrics = client.get("/metrics").text
        assert all(f'specgen_replica_forks_total{{dp_rank="{rank}"}}' in metrics for rank in (0, 1))

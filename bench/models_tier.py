"""Evicted prefixes of bench.models, restored from the peer GPU: tokens, seconds and bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from bench.kv_tier_client import random_ids
from bench.models_client import Client, Generated
from bench.models_compare import TOLERANCE, distance
from bench.models_servers import Running

LENGTHS = (8_192, 32_768, 131_072)
ANSWER = 16
SUFFIX = 8


def restores(running: Running, lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, Any]]:
    """A row a length: computed, evicted by another prompt of the pool's size, restored, found in the own cache.

    That other prompt is computed first, too: the kernels of long prefills compile in it, not in what is timed.
    Tokens and first logprobs are compared with the computed answer's and with `kept`, the same prompt asked right after
    it: the same KV where it was computed, a few tokens prefilled behind it. Is that as far from the computed answer as
    what was restored, restoring adds nothing. The pool holds one prefix of the longest length.
    """
    client = running.client
    client.flush()
    filler = random_ids(99, max(lengths))
    client.generate(filler, ANSWER)
    computed, kept = {}, {}
    for length in lengths:
        computed[length], kept[length] = ask(client, length), ask(client, length)
    client.generate(filler, 1)
    _settle(client)
    for length in lengths:
        client.generate(filler, 1)
        before = _counts(client)
        restored = ask(client, length)
        after = _counts(client)
        own = [ask(client, length) for _ in range(3)]
        moved = after.get("restored_bytes", 0) - before.get("restored_bytes", 0)
        busy = after.get("restore_seconds", 0.0) - before.get("restore_seconds", 0.0)
        yield {
            "prefix_tokens": length,
            "recompute_s": computed[length].seconds,
            "peer_s": restored.seconds,
            "own_s": statistics.median(one.seconds for one in own),
            "recompute_over_peer": computed[length].seconds / restored.seconds,
            "restored_tokens": restored.restored,
            "restored_bytes": moved,
            "bytes_per_token": moved / restored.restored if restored.restored else None,
            "gbps": moved / busy / 1e9 if busy else None,
            "tokens_equal": restored.ids == computed[length].ids,
            "logprob": distance(restored, computed[length]),
            "kept": {
                "tokens_equal": restored.ids == kept[length].ids,
                "logprob": distance(restored, kept[length]),
                "tokens_equal_computed": kept[length].ids == computed[length].ids,
                "logprob_computed": distance(kept[length], computed[length]),
            },
            "tolerance": TOLERANCE,
            "state": client.state(),
        }


def ask(client: Client, length: int) -> Generated:
    return client.generate(random_ids(length, length) + random_ids(7, SUFFIX), ANSWER)


def _settle(client: Client, seconds: float = 1.0) -> None:
    """Writes to the peer end beside the requests; the scheduler looks at them when it is asked."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.state()
        time.sleep(0.1)


def _counts(client: Client) -> dict[str, float]:
    _settle(client, 0.3)
    counts: dict[str, float] = client.state().get("specgen_kv", {}).get("counts", {})
    return counts

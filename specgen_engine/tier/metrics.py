"""specgen_kv_* metrics of one scheduler, and the same counts for `/server_info`."""

from __future__ import annotations

import threading
from typing import Any

# name -> help; prometheus adds _total.
COUNTERS = {
    "written_bytes": "Bytes written to the tier.",
    "restored_bytes": "Bytes read back from the tier.",
    "write_seconds": "Seconds spent writing (only where writing waits: loopback).",
    "restore_seconds": "Seconds of restores, first byte to last.",
    "restores": "Prefixes restored.",
    "admission_seconds": "Seconds that the scheduler itself spent on restores before their forward.",
    "check_seconds": "Of these, holding pages and comparing their tags.",
    "launch_seconds": "Of these, preparing and launching the copies.",
    "restored_tokens": "Tokens of restored prefixes.",
    "prefetched_tokens": "Tokens of prefixes restored before their request was admitted.",
    "hit_tokens_device": "Prompt tokens found in the GPU's own cache.",
    "hit_tokens_tier": "Prompt tokens restored from the tier.",
    "hit_tokens_storage": "Prompt tokens restored from a storage backend through the tier.",
    "missed_tokens": "Prompt tokens that the tier had once and could not give back.",
    "quiet_misses": "Restores not tried because the lender was timing.",
    "revoked_chunks": "Chunks that lenders took back.",
    "moved_pages": "Pages moved to another chunk when theirs was taken back.",
    "lost_pages": "Pages dropped because a lender took them, or had no room.",
    "mismatched_pages": "Pages whose tag was another's when they were to be read: treated as a miss.",
    "late_mismatched_pages": "Pages whose tag changed while they were read.",
    "lenders_lost": "Lenders that died or ended a lease.",
}
GAUGES = {
    "capacity_pages": "Pages that lenders give room for.",
    "used_pages": "Logical pages in use.",
    "window_capacity_pages": "The same of DeepSeek-V4's window, which has pages of its own.",
    "window_used_pages": "The same of DeepSeek-V4's window.",
}


class Stats:
    """Thread-safe counts; exported too when the server has metrics on.

    Args:
        export: create prometheus metrics; only after SGLang has set up prometheus' multiprocess folder.
        rank: tensor-parallel rank, the metrics' label.
    """

    def __init__(self, export: bool = False, rank: int = 0) -> None:
        self._lock = threading.Lock()
        self.counts: dict[str, float] = dict.fromkeys([*COUNTERS, *GAUGES], 0)
        self._exported: dict[str, Any] = _create(str(rank)) if export else {}

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self.counts[name] += amount
        if name in self._exported:
            self._exported[name].inc(amount)

    def put(self, name: str, value: float) -> None:
        with self._lock:
            self.counts[name] = value
        if name in self._exported:
            self._exported[name].set(value)


def _create(rank: str) -> dict[str, Any]:
    from prometheus_client import Counter, Gauge

    counters = {name: Counter(f"specgen_kv_{name}", text, ["tp_rank"]) for name, text in COUNTERS.items()}
    gauges = {
        name: Gauge(f"specgen_kv_{name}", text, ["tp_rank"], multiprocess_mode="livemostrecent")
        for name, text in GAUGES.items()
    }
    return {name: metric.labels(rank) for name, metric in (*counters.items(), *gauges.items())}

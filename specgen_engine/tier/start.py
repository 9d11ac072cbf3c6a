"""What can be known before a model is loaded: which lenders would lend."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from specgen_engine.config import KvConfig
from specgen_engine.kv.base import KvError, LeaseRefused, PeerGone, PeerTimeout
from specgen_engine.kv.borrower import Link

BACKENDS = {"peer": "cuda", "loopback": "loopback"}


class _Enquirer:
    """Stands for an arena in a claim that borrows nothing."""

    def __init__(self, backend: str, chunk_bytes: int) -> None:
        self.backend = SimpleNamespace(name=backend)
        self.chunk_bytes = chunk_bytes

    def revoke(self, slots: Iterable[int], *_args: Any, **_kwargs: Any) -> list[int]:
        return []

    def retire(self, slots: Iterable[int]) -> None: ...

    def pause(self, slots: Iterable[int], duration_s: float) -> None: ...

    def drain(self, slots: Iterable[int], timeout_s: float) -> bool:
        return True

    def resume(self, slots: Iterable[int]) -> None: ...


def usable_lenders(kv: KvConfig) -> tuple[dict[str, int], dict[str, str]]:
    """(chunks on offer by lender, why not by the others): each is claimed and let go at once."""
    usable: dict[str, int] = {}
    refusals: dict[str, str] = {}
    arena: Any = _Enquirer(BACKENDS[kv.tier], kv.chunk_mib << 20)
    directory = kv.socket_directory
    for path in sorted(directory.glob("*.sock")) if directory.is_dir() else []:
        try:
            link = Link(arena, path, f"{os.getpid()}-enquiry", timeout_s=3.0)
        except (PeerGone, PeerTimeout, LeaseRefused) as error:
            refusals[path.stem] = str(error)
            continue
        usable[path.stem] = link.total_chunks
        try:
            link.close(timeout_s=1.0)
        except KvError as error:
            refusals[path.stem] = str(error)
    return usable, refusals

"""A radix cache over shared memory, three of whose prefixes only the tier has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TOKENS = 1024


@pytest.fixture
def evicted(tmp_path: Path, group: Any) -> Iterator[Any]:
    """A Setting. Imported here: where a release has no tier, that import skips the module that asks."""
    from tests.tier.support import Setting, radix_cache, tier
    from tests.tier.two_ranks import PAGE, evict, publish

    folder = tmp_path / "lender"
    folder.mkdir(mode=0o700)
    with tier(folder, "mha", PAGE, torch.float32, chunks=(13,), chunk_bytes=256 << 10, tokens=TOKENS) as one:
        cache = radix_cache(one, group)
        for prefix in range(3):
            publish(cache, one, prefix)
        evict(cache)
        yield Setting(cache, one)
        one.pool.check_integrity()

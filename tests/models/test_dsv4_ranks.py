"""Two ranks lose different pages of DeepSeek-V4's tokens and windows: their trees stay the same, step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.dsv4_ranks import ROUNDS
from tests.tier import support  # noqa: F401  (skips where a release has no tier)
from tests.tier.forked_ranks import ranks_environment

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]


def test_trees_and_indices_stay_the_same_in_storms_of_losses_deaths_and_prefetches(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.models.dsv4_ranks", "2", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ranks_environment(), cwd=ROOT, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for seen in ranks[0]["storms"]:
        assert len(seen) == ROUNDS
        assert len(set(seen)) > ROUNDS / 4
    assert ranks[0]["storms"] == ranks[1]["storms"]
    revoked = [[counts["revoked_chunks"] for counts in rank["own"]] for rank in ranks]
    assert revoked[0] != revoked[1], "each rank lost pages of its own"
    for rank in ranks:
        for name in ("prefetched_tokens", "lost_pages", "restored_tokens", "missed_tokens"):
            assert sum(counts[name] for counts in rank["own"]) > 0, name

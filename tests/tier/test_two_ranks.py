"""Two ranks with lenders of their own lose different pages: their trees stay the same, what they restore is right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tier.forked_ranks import ranks_environment
from tests.tier.two_ranks import LENGTH, PAGE, PREFIXES, ROUNDS

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]


def run(folder: Path, world: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.tier.two_ranks", str(world), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ranks_environment(), cwd=ROOT, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ranks"), 2)


def test_the_trees_never_differ(ranks: list[dict[str, Any]]) -> None:
    own = [one.pop("own") for one in (dict(rank) for rank in ranks)]
    stages = [{key: value for key, value in rank.items() if key != "own"} for rank in ranks]
    assert stages[0] == stages[1]
    assert own[0] != own[1], "each rank lost pages of its own: their books can't be the same"


def test_what_one_rank_lost_all_dropped_and_no_more(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    whole = [[10_000 * (n + 1), LENGTH, True, True, 0] for n in range(PREFIXES)]
    assert first["published"] == whole
    left = sum(length for _, length, _, _, _ in first["after_loss"])
    assert 0 < left < PREFIXES * LENGTH
    assert all(backed and evicted for _, _, evicted, backed, _ in first["after_loss"])
    assert sum(first["restored"]) < left, "the second loss came between a step and the restores"
    assert all(found % PAGE == 0 for found in first["restored"])
    assert any(first["restored"])
    assert sum(first["again"]) > 0
    assert first["device"] == 1024


def test_trees_and_indices_stay_the_same_in_storms_of_losses_and_prefetches(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks[0]["storms"]:
        assert len(seen) == ROUNDS
        assert len(set(seen)) > ROUNDS / 4
    assert ranks[0]["storms"] == ranks[1]["storms"]
    revoked = [[counts["revoked_chunks"] for counts in rank["own"]["storms"]] for rank in ranks]
    assert revoked[0] != revoked[1]
    for rank in ranks:
        for name in ("prefetched_tokens", "lost_pages", "restored_tokens"):
            assert sum(counts[name] for counts in rank["own"]["storms"]) > 0


def test_both_kinds_of_loss_are_counted(ranks: list[dict[str, Any]]) -> None:
    assert [rank["own"]["revoked_chunks"] for rank in ranks] == [5, 4]
    for rank in ranks:
        assert rank["own"]["lost_pages"] > 0
        assert rank["own"]["missed_tokens"] > 0
        assert "late_mismatched_pages" not in rank["own"]

"""Scripted ids replace sampled ones by request and position, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from specgen_engine.protocol import ReplayScript
from specgen_engine.replay import sampler


@pytest.fixture(autouse=True)
def no_scripts() -> Iterator[None]:
    yield
    sampler.SCRIPTS.clear()


def sample(rids: list[str], seq_lens: list[int]) -> list[int]:
    ids = torch.full((len(rids),), 99)
    batch = SimpleNamespace(rids=rids, seq_lens_cpu=torch.tensor(seq_lens))
    result = sampler.sample(ids, None, None, batch)
    return (ids if result is None else result).tolist()


def test_each_row_gets_the_id_of_its_position() -> None:
    sampler.load(ReplayScript(rid="a", prompt_tokens=10, ids=[1, 2, 3]))
    sampler.load(ReplayScript(rid="b", prompt_tokens=5, ids=[7]))
    assert sample(["a", "free", "b"], [10, 4, 5]) == [1, 99, 7]
    assert sample(["a", "b"], [12, 6]) == [3, 99]


def test_a_chunk_of_the_prompt_is_left_alone() -> None:
    sampler.load(ReplayScript(rid="a", prompt_tokens=10, ids=[1]))
    assert sample(["a"], [6]) == [99]


def test_ended_searches_are_forgotten_with_their_forks() -> None:
    for rid in ("base", "specgen-fork.base.1", "specgen-fork.other.1"):
        sampler.load(ReplayScript(rid=rid, prompt_tokens=0, ids=[1]))
    sampler.forget("base", "specgen-fork.base.")
    assert list(sampler.SCRIPTS) == ["specgen-fork.other.1"]

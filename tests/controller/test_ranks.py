"""Which replica a search runs on, and which GPUs a server's ranks have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specgen_engine.controller.ranks import Ranks, gpus_of


def test_the_replica_with_the_fewest_searches_is_next_and_equals_take_turns() -> None:
    ranks = Ranks(3)
    assert [ranks.next([]) for _ in range(4)] == [0, 1, 2, 0]
    assert ranks.next([0, 0, 1, 2, 2]) == 1
    assert ranks.next([1, 2]) == 0
    assert ranks.count([0, 2, 2, None]) == [1, 0, 2]


def test_a_server_without_replicas_pins_nothing() -> None:
    assert Ranks(1).next([None]) is None


@pytest.mark.parametrize(
    ("size", "attention", "gpus"), [(1, False, [2, 4]), (2, False, [2, 4, 6, 8]), (2, True, [2, 4])],
    ids=["one", "replicas", "DP attention"],
)  # fmt: skip
def test_gpus_of_replicas_are_their_own_but_with_dp_attention(size: int, attention: bool, gpus: list[int]) -> None:
    server = SimpleNamespace(base_gpu_id=2, gpu_id_step=2, tp_size=2, dp_size=size, enable_dp_attention=attention)
    assert list(gpus_of(server)) == gpus

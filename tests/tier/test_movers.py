"""Which layers one launch of a restore moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.tier.movers import LAYERS_PER_LAUNCH, launch_groups


@given(st.integers(1, 200), st.integers(1, 8))
def test_every_layer_is_moved_once_and_in_order(layers: int, most: int) -> None:
    groups = launch_groups(layers, most)
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert max(map(len, groups)) <= most


def test_the_first_layers_come_alone() -> None:
    assert [len(group) for group in launch_groups(36)][:4] == [1, 1, 2, LAYERS_PER_LAUNCH]
    assert len(launch_groups(36)) == 11

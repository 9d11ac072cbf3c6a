"""Which layers one launch of a restore moves, and what it is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.tier import movers
from specgen_engine.tier.movers import LAYERS_PER_LAUNCH, launch_groups, tables_of


@given(st.integers(1, 200), st.integers(1, 8))
def test_every_layer_is_moved_once_and_in_order(layers: int, most: int) -> None:
    groups = launch_groups(layers, most)
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert max(map(len, groups)) <= most


def test_the_first_layers_come_alone() -> None:
    assert [len(group) for group in launch_groups(36)][:4] == [1, 1, 2, LAYERS_PER_LAUNCH]
    assert len(launch_groups(36)) == 11


def test_each_launch_is_given_the_same_pages_and_flags_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "_kv", SimpleNamespace(DeviceTables=lambda *addresses: addresses))
    pages, table = torch.zeros(5, dtype=torch.int64), torch.zeros((2, 5), dtype=torch.int64)
    flags = torch.zeros((3, 5), dtype=torch.int32)
    assert tables_of(pages, table, flags) == [
        (pages.data_ptr(), table[0].data_ptr(), table[1].data_ptr(), row.data_ptr(), 5, 1) for row in flags
    ]

"""Turns on a GPU: checks side by side, timing alone, and those who want to time before newcomers."""

from __future__ import annotations

import pytest

from specgen_engine.evaluation.gpulock import GpuTurn

DEVICE = "cuda:77"


class Waits(Exception):
    """It would have to wait."""


def _impatient(_seconds: float) -> None:
    raise Waits


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_checks_side_by_side_timing_alone() -> None:
    first, second, third = (GpuTurn(DEVICE, _impatient) for _ in range(3))
    first.share()
    second.share()
    with pytest.raises(Waits):
        first.alone()
    second.close()
    first.alone()
    with pytest.raises(Waits):
        third.share()
    first.close()


def test_who_waits_to_time_goes_before_newcomers() -> None:
    first, second, newcomer = (GpuTurn(DEVICE, _impatient) for _ in range(3))
    first.share()
    second.share()
    with pytest.raises(Waits):
        first.alone()
    with pytest.raises(Waits):
        second.alone()
    first.alone()
    with pytest.raises(Waits):
        newcomer.share()
    first.close()
    second.alone()  # the newcomer holds nothing that it needs
    second.close()
    newcomer.share()

"""Turns on a GPU: checks side by side, timing alone, and those who want to time before newcomers."""

from __future__ import annotations

import pytest

from specgen_engine.evaluation.gpulock import GpuTurn, name_of_gpu

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


def test_who_has_timed_lets_others_check_but_not_time() -> None:
    first, second = (GpuTurn(DEVICE, _impatient) for _ in range(2))
    first.share()
    first.alone()
    with pytest.raises(Waits):
        second.share()
    second.close()
    first.beside_others(_impatient)
    third = GpuTurn(DEVICE, _impatient)
    third.share()
    with pytest.raises(Waits):
        third.alone()
    first.close()
    third.alone()


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


@pytest.mark.parametrize(
    ("visible", "device", "name"),
    [
        (None, "cuda:1", "1"),
        ("", "cuda", "0"),
        ("1", "cuda:0", "1"),
        ("3, 2", "cuda:1", "2"),
        ("GPU-4f1a", "cuda:0", "GPU-4f1a"),
        ("1", "cuda:5", "5"),
    ],
)
def test_a_gpu_has_one_name_however_it_is_counted(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, device: str, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert name_of_gpu(device) == name

"""The copies' bench as far as it goes without a GPU."""

from __future__ import annotations

import pytest
import torch

from bench import elastic_copies
from bench.elastic_copies import variation


def test_variation_worked_out_by_hand() -> None:
    assert variation([1000, 2000, 3000]) == {
        "calls": 3, "median_us": 2.0, "cv": 0.5, "robust_cv": round(2 / 1.349 / 2, 5),
    }  # fmt: skip
    steady = [1000, 1010] * 50
    assert variation([*steady, 90_000])["cv"] > 1.0
    assert variation([*steady, 90_000])["robust_cv"] < 0.01, "one spike is no variation of the kernel"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so without a GPU only")
def test_without_a_gpu_it_is_skipped(capsys: pytest.CaptureFixture) -> None:
    assert elastic_copies.main([]) == 0
    assert capsys.readouterr().out == "skipped: needs a GPU\n"


def test_a_turn_without_calls_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        elastic_copies.main(["--repeats", "0"])
    assert "--repeats 0: use a number above 0" in capsys.readouterr().err

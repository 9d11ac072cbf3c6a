"""Tolerances, statistics, digests and static checks: pure functions."""

from __future__ import annotations

import pytest
import torch

from specgen_engine.evaluation.base import Status
from specgen_engine.evaluation.compare import difference, same_bits
from specgen_engine.evaluation.digest import error_digest
from specgen_engine.evaluation.static import static_check
from specgen_engine.evaluation.tensors import LayoutError, create_region, read_values, write_values
from specgen_engine.evaluation.timing import skips_repeats


def test_zeros_never_pass_for_small_values() -> None:
    small = torch.full((1000,), 1e-6)
    found = difference(torch.zeros(1000), small)
    assert found is not None
    assert found.kind == "value"


def test_rounding_in_another_order_passes() -> None:
    x = torch.randn(64, 4096)
    assert difference(x.double().sum(1).float(), x.flip(1).sum(1)) is None
    half = torch.randn(4096).bfloat16()
    assert difference((half.float() * 1.004).bfloat16(), half) is None


def test_one_wrong_element_is_found() -> None:
    expected = torch.randn(1 << 20)
    for dtype in (torch.float32, torch.bfloat16):
        actual = expected.to(dtype, copy=True)
        actual[12345] += 1
        assert difference(actual, expected.to(dtype)) is not None


def test_a_few_last_place_outliers_pass_in_low_precision_only() -> None:
    expected = torch.ones(1 << 20)
    actual = expected.clone()
    actual[5] += 0.1
    assert difference(actual.bfloat16(), expected.bfloat16()) is None
    assert difference(actual, expected) is not None


def test_nan_and_infinity_must_agree() -> None:
    expected = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    assert difference(expected.clone(), expected) is None
    assert difference(expected.nan_to_num(), expected) is not None
    assert difference(torch.tensor([float("nan")] * 4), expected).kind == "nan"


def test_integers_are_exact() -> None:
    expected = torch.arange(100)
    assert difference(expected.clone(), expected) is None
    assert difference(expected + (expected == 7), expected).reason == "the output: 1 of 100 elements differ"


def test_same_bits() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert same_bits([x], [x.clone()])
    assert not same_bits([x], [x + 1e-7])


VALUES = [
    torch.randn(3, 5).t(), torch.randn(4, 4)[:, ::2], torch.ones(2, 3).bfloat16(), torch.arange(5), torch.tensor(True),
    torch.zeros(0, 4), torch.randn(8).to(torch.float8_e4m3fn), {"a": [1, 2.5, None, "x"], "b": (torch.ones(1),)},
]  # fmt: skip


def test_values_make_the_round_trip() -> None:
    fd = create_region("test")
    layout, end = write_values(fd, VALUES)
    back = read_values(fd, layout)
    assert same_bits([v for v in VALUES if isinstance(v, torch.Tensor)][:6], back[:6])
    assert back[0].stride() == VALUES[0].stride()
    assert back[7]["a"] == [1, 2.5, None, "x"]
    assert write_values(fd, VALUES, end)[1] > end


@pytest.mark.parametrize("layout", [
    {"t": ["float32", [1 << 50], [1], 0]}, {"t": ["float32", [4], [-1], 0]}, {"t": ["no", [4], [1], 0]}, {"q": 1}, [],
    {"t": ["float32", [4], [1], -4096]}, {"l": 5}, None,
])  # fmt: skip
def test_a_forged_layout_is_one_error(layout: object) -> None:
    with pytest.raises(LayoutError):
        read_values(create_region("test"), layout)


def test_skipping_needs_every_fresh_call_to_be_slow() -> None:
    assert skips_repeats([9_000_000, 8_000_000], [1_000_000] * 9)
    assert not skips_repeats([9_000_000, 1_100_000], [1_000_000] * 9)


def test_static_faults() -> None:
    assert static_check("class ModelNew: pass", 1 << 20) is None
    assert static_check("from x import Y as ModelNew", 1 << 20) is None
    assert static_check("ModelNew = make()", 1 << 20) is None
    cases = {
        "": Status.COMPILE_ERROR,
        "import socket\nclass ModelNew: pass": Status.REJECTED,
        "(" * 5000: Status.COMPILE_ERROR,
        "class ModelNew: pass\0": Status.REJECTED,
        "\ud800": Status.REJECTED,
        "x" * 50: Status.COMPILE_ERROR,
    }
    for source, status in cases.items():
        fault = static_check(source, 1 << 20)
        assert fault is not None
        assert fault.status is status


def test_digest_names_the_first_error_and_a_hint() -> None:
    text = """RuntimeError: Error building extension 'x': [1/2] c++ -c main.cpp
/scratch/torch/x/main.cpp: In function 'int f()':
/scratch/torch/x/main.cpp:12:8: error: 'foo' was not declared in this scope
   12 | return foo;
      |        ^~~
/scratch/torch/x/main.cpp:13:8: error: later
ninja: build stopped: subcommand failed."""
    lines = error_digest(text).splitlines()
    assert lines[0] == "main.cpp:12:8: error: 'foo' was not declared in this scope"
    assert "return foo" in lines[1]
    assert lines[-1].startswith("hint: include its header")

"""The stand-in for sgl_kernel, in a process of its own: its finder must not reach the other tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specgen_engine.serving.cpu import STUB


def run(code: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path.insert(0, {str(STUB)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "statement",
    [
        "import sgl_kernel.any.depth.at_all",
        "from sgl_kernel import rmsnorm, silu_and_mul",
        "from sgl_kernel.scalar_type import scalar_types; scalar_types.uint4b8.size_bits",
        "from sgl_kernel.quantization import A\nclass B(A): pass",
    ],
)
def test_names_import(statement: str) -> None:
    done = run(statement)
    assert done.returncode == 0, done.stderr


def test_stands_before_the_wheel() -> None:
    assert run("import sgl_kernel; print(sgl_kernel.__file__)").stdout.startswith(str(STUB))


def test_call_names_the_attribute() -> None:
    done = run("from sgl_kernel.kvcacheio import transfer_kv\ntransfer_kv(1)")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("NotImplementedError: sgl_kernel.kvcacheio.transfer_kv needs a GPU")


def test_protocol_names_are_missing_ones() -> None:
    assert run("import sgl_kernel; sgl_kernel.__version__").stderr.splitlines()[-1].startswith("AttributeError")

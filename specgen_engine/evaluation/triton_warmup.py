"""What Triton does once a process, done before candidates are forked: they inherit it.

Before its first kernel Triton hashes its own installation (415 MB of libtriton.so), asks ptxas for its version and
starts LLVM: 0.4-0.8 s and 0.2 s on an EPYC core, in every candidate's check. Nothing here asks a driver.
"""

from __future__ import annotations

import os
import sys
import tempfile

import triton
import triton.language as tl

CAPABILITY = 90
"""ptxas's version is kept by this; compiling names its target, so no GPU is asked for it."""


@triton.jit
def _rows(x, y, n: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    at = tl.arange(0, n)
    value = tl.load(x + row * n + at)
    tl.store(y + row * n + at, tl.exp(value - tl.max(value, 0)))


def warm_up_compiler() -> None:
    """Compile one small kernel. A Triton that can't costs candidates time, nothing else: said on stderr."""
    own = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="specgen-triton-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            _compile()
        except Exception as error:
            print(f"triton's compiler is not warm: {error}"[:400], file=sys.stderr, flush=True)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if own is not None:
                os.environ["TRITON_CACHE_DIR"] = own


def _compile() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x": "*fp32", "y": "*fp32", "n": "constexpr"}
    source = ASTSource(_rows, signature=signature, constexprs={(2,): 1024})
    triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))

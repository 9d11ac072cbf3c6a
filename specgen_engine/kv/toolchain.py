"""Where nvcc and the CUTLASS headers are: used by the build, the compile tests and the benchmark's build on a GPU host."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

ARCH_FLAGS = ("-gencode=arch=compute_90a,code=sm_90a",)
COMPILE_FLAGS = ("-std=c++17", "-O3", "-lineinfo", *ARCH_FLAGS, "-Xcompiler", "-fPIC")


class ToolchainError(RuntimeError):
    """A tool is named but unusable; the message says which and what to install."""


@dataclass(frozen=True)
class Toolchain:
    """`nvcc` and `cutlass_include` are both set, or the CUDA part can't be built and `missing` says why."""

    nvcc: Path | None
    cutlass_include: Path | None
    missing: str | None = None

    def describe(self) -> str:
        return f"CUDA by {self.nvcc}" if self.nvcc else f"CPU part only ({self.missing})"


def _package_file(package: str, relative: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(root) / relative
        if candidate.exists():
            return candidate
    return None


def find_nvcc() -> Path | None:
    """SPECGEN_NVCC, else nvcc on PATH or under CUDA_HOME, else the package nvidia-cuda-nvcc.

    Raises:
        ToolchainError: SPECGEN_NVCC names no file.
    """
    named = os.environ.get("SPECGEN_NVCC")
    if named is not None:
        if not Path(named).is_file():
            raise ToolchainError(f"SPECGEN_NVCC={named!r} is no file: set it to an nvcc of CUDA 13, or unset it")
        return Path(named)
    for candidate in (shutil.which("nvcc"), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    return _package_file("nvidia", "cu13/bin/nvcc")


def find_cutlass() -> Path | None:
    """SPECGEN_CUTLASS_INCLUDE, else the headers in the package nvidia-cutlass.

    Raises:
        ToolchainError: SPECGEN_CUTLASS_INCLUDE holds no CUTLASS headers.
    """
    named = os.environ.get("SPECGEN_CUTLASS_INCLUDE")
    if named is not None:
        if not (Path(named) / "cutlass" / "arch" / "barrier.h").is_file():
            raise ToolchainError(f"SPECGEN_CUTLASS_INCLUDE={named!r} has no cutlass/arch/barrier.h: name an include folder")
        return Path(named)
    return _package_file("cutlass_library", "source/include")


def find_toolchain() -> Toolchain:
    """What the CUDA part would be built with here."""
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if nvcc is None:
        return Toolchain(None, None, "no nvcc: install nvidia-cuda-nvcc or set SPECGEN_NVCC")
    if cutlass is None:
        return Toolchain(None, None, "no CUTLASS headers: install nvidia-cutlass or set SPECGEN_CUTLASS_INCLUDE")
    return Toolchain(nvcc, cutlass)


def compile_command(tools: Toolchain, source: Path, target: Path, *extra: str) -> list[str]:
    """The command that compiles one .cu file for sm_90a; raises ToolchainError when there is no nvcc."""
    if tools.nvcc is None:
        raise ToolchainError(tools.missing or "no nvcc")
    return [str(tools.nvcc), *COMPILE_FLAGS, *extra, f"-I{tools.cutlass_include}", "-c", str(source), "-o", str(target)]


def explain_failure(output: str) -> str:
    """A compile error's remedy where the cause is known."""
    if "Unsupported .version" in output:
        return (
            "nvcc's front end (package nvidia-nvvm) is newer than its ptxas (nvidia-cuda-nvcc): install the same release, "
            "pip install 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*'"
        )
    return "see the compiler's output above"

"""Where nvcc and the CUTLASS headers are: for the build, the compile tests and the build on a GPU host."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
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
    cuda_home: Path | None = None
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
            raise ToolchainError(
                f"SPECGEN_CUTLASS_INCLUDE={named!r} has no cutlass/arch/barrier.h: name an include folder"
            )
        return Path(named)
    return _package_file("cutlass_library", "source/include")


def cuda_home(nvcc: Path) -> Path:
    """The toolkit's folder with include/ and lib/, by nvcc's own word where it is a wrapper script.

    Raises:
        ToolchainError: nvcc does not run.
    """
    near = nvcc.resolve().parent.parent
    if (near / "include" / "cuda_runtime.h").is_file():
        return near
    said = subprocess.run(
        [str(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, timeout=30
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if top is None:
        raise ToolchainError(
            f"{nvcc} does not say where its toolkit is: set SPECGEN_NVCC to the nvcc inside a CUDA toolkit"
        )
    return Path(top.group(1)).resolve()


def package_mismatch(nvcc: Path) -> str | None:
    """Why an nvcc from packages can't work, if so: its parts are packages too, and pip takes the newest of each."""
    if nvcc != _package_file("nvidia", "cu13/bin/nvcc"):
        return None
    versions = {name: ".".join(metadata.version(name).split(".")[:2]) for name in ("nvidia-cuda-nvcc", "nvidia-nvvm")}
    ours = versions["nvidia-cuda-nvcc"]
    if versions["nvidia-nvvm"] == ours:
        return None
    return (
        f"nvidia-nvvm {versions['nvidia-nvvm']} does not fit nvidia-cuda-nvcc {ours}: "
        f"pip install 'nvidia-nvvm=={ours}.*' 'nvidia-cuda-crt=={ours}.*'"
    )


def find_toolchain() -> Toolchain:
    """What the CUDA part would be built with here."""
    nvcc, cutlass = find_nvcc(), find_cutlass()
    if nvcc is None:
        return Toolchain(None, None, missing="no nvcc: install nvidia-cuda-nvcc or set SPECGEN_NVCC")
    if mismatch := package_mismatch(nvcc):
        return Toolchain(None, None, missing=mismatch)
    if cutlass is None:
        return Toolchain(
            None, None, missing="no CUTLASS headers: install nvidia-cutlass or set SPECGEN_CUTLASS_INCLUDE"
        )
    return Toolchain(nvcc, cutlass, cuda_home(nvcc))


def compile_command(tools: Toolchain, source: Path, target: Path, *extra: str) -> list[str]:
    """The command that compiles one .cu file for sm_90a; raises ToolchainError when there is no nvcc."""
    if tools.nvcc is None:
        raise ToolchainError(tools.missing or "no nvcc")
    return [str(tools.nvcc), *COMPILE_FLAGS, *extra, f"-I{tools.cutlass_include}", "-c", str(source), "-o", str(target)]


def explain_failure(output: str) -> str:
    """A compile error's remedy where the cause is known."""
    if "Unsupported .version" in output:
        return (
            "nvcc's front end (nvidia-nvvm) is newer than its ptxas (nvidia-cuda-nvcc): install the same release, "
            "pip install 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*'"
        )
    return "see the compiler's output above"

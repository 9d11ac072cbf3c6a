"""A C++ extension compiles in a fraction of the time when it reads fewer of torch's headers.

`torch/extension.h` is 16 MB of text after preprocessing, which g++ reads once and nvcc three times; what a kernel's
host code needs of it is half of that. `include/` has those few of torch's headers that pull in the rest, with
PyTorch's own per-operator headers in their place; a compiler finds them first (CPATH comes before -isystem).
`bin/ninja` stands before the real one on PATH, builds with them, and where a source needs more, builds again with
torch's own. `bin/nvcc` lets nvcc's two readings of a source, for the host and for the device, go on side by side. What
is compiled from a source is the same either way. SPECGEN_FULL_HEADERS=1 switches all of this off.

Measured (nvcc 13.0, torch 2.11): docs/evaluation.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEADERS, PROGRAMS = FOLDER / "include", FOLDER / "bin"
SWITCH = "SPECGEN_FULL_HEADERS"


def environment() -> dict[str, str]:
    """For a process that builds with torch's load_inline; empty where switched off, or where there is no ninja."""
    path = os.environ.get("PATH", os.defpath)
    ninja = shutil.which("ninja", path=_without(path, PROGRAMS))
    if os.environ.get(SWITCH) == "1" or ninja is None or not os.access(PROGRAMS / "ninja", os.X_OK):
        return {}
    return {
        "PATH": os.pathsep.join((str(PROGRAMS), path)),
        "SPECGEN_NINJA": ninja,
        "SPECGEN_LEAN_HEADERS": str(HEADERS),
        **_nvcc(),
    }


def _nvcc() -> dict[str, str]:
    """torch's own order of search. The dependencies that it has nvcc write are of no use in a folder built in once."""
    folder = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{folder}/bin/nvcc" if folder else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK) or not os.access(PROGRAMS / "nvcc", os.X_OK):
        return {}
    return {
        "PYTORCH_NVCC": str(PROGRAMS / "nvcc"),
        "SPECGEN_REAL_NVCC": nvcc,
        "TORCH_EXTENSION_SKIP_NVCC_GEN_DEPENDENCIES": "1",
    }


def _without(path: str, folder: Path) -> str:
    return os.pathsep.join(entry for entry in path.split(os.pathsep) if Path(entry) != folder)

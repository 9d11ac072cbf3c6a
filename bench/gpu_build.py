"""Build specgen_engine._kv with nvcc alone, on a GPU host that has neither CMake's pybind11 nor the packages.

    python -m bench.gpu_build [--include DIR ...] [--output specgen_engine]

`--include` adds folders with pybind11's and CUTLASS's headers (bench.pack_gpu_host carries them).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from specgen_engine.kv.toolchain import ToolchainError, cuda_home, explain_failure, find_nvcc

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DSPECGEN_WITH_CUDA"]
DEVICE_FLAGS = ["-lineinfo", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v,-warn-spills"]


def python_headers() -> Path:
    """Raises ToolchainError when this Python came without its headers."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        raise ToolchainError(
            f"{folder} has no Python.h: install this Python's development headers, or carry a built _kv"
        )
    return folder


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolchainError(f"{' '.join(command)}\n{done.stdout}{done.stderr}\n{explain_failure(done.stderr)}")
    return done.stderr


def build(includes: list[Path], output: Path, jobs: int) -> Path:
    """Compile everything and place the module in `output`; returns its path. Raises ToolchainError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise ToolchainError("no nvcc: put it on PATH or set SPECGEN_NVCC")
    folders = [f"-I{folder}" for folder in [*includes, python_headers()]]
    sources = [*sorted(ROOT.glob("csrc/**/*.cpp")), *sorted(ROOT.glob("kernels/*.cu"))]
    with tempfile.TemporaryDirectory(prefix="specgen-build-") as scratch:

        def compile_one(source: Path) -> str:
            target = Path(scratch) / f"{source.parent.name}-{source.name}.o"
            device = DEVICE_FLAGS if source.suffix == ".cu" else []
            run_output = run([str(nvcc), *FLAGS, *device, *folders, "-c", str(source), "-o", str(target)])
            return run_output if device else ""

        with ThreadPoolExecutor(jobs) as pool:
            for said in pool.map(compile_one, sources):
                print(said, end="")
        target = output / f"_kv{sysconfig.get_config_var('EXT_SUFFIX')}"
        built = Path(scratch) / target.name
        objects = sorted(str(path) for path in Path(scratch).glob("*.o"))
        libraries = [f"-L{folder}" for name in ("lib64", "lib") if (folder := cuda_home(nvcc) / name).is_dir()]
        run([str(nvcc), "-shared", *libraries, "-Xcompiler", "-fPIC", "-cudart", "static", *objects, "-o", str(built)])
        shutil.copyfile(built, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--include", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "specgen_engine")
    parser.add_argument("--jobs", type=int, default=8)
    args = parser.parse_args()
    try:
        print(build(args.include, args.output, args.jobs))
    except ToolchainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

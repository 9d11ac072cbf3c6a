"""Builds the extension specgen_engine._kv through CMake and ninja; all metadata is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_toolchain():
    """bench/gpu_build.py, the tests and this file find nvcc and CUTLASS the same way."""
    spec = importlib.util.spec_from_file_location("specgen_toolchain", ROOT / "specgen_engine" / "kv" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        tools = load_toolchain().find_toolchain()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DSPECGEN_NVCC={tools.nvcc or ''}",
            f"-DSPECGEN_CUDA_HOME={tools.cuda_home or ''}",
            f"-DSPECGEN_CUTLASS_INCLUDE={tools.cutlass_include or ''}",
        ]
        print(f"specgen_engine._kv: {tools.describe()}")
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *options], check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", "2"], check=True)


setup(ext_modules=[Extension("specgen_engine._kv", sources=[])], cmdclass={"build_ext": CMakeBuild})

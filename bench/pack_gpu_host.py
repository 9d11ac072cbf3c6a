"""Collect what an air-gapped GPU host needs to build and run the KV transport: headers and small wheels.

    python -m bench.pack_gpu_host OUT

OUT/include gets pybind11's headers and the CUTLASS headers that the kernels include; OUT/site gets pure-Python and
cp312 packages (pytest, msgspec ...), unpacked; OUT/sgl_kernel.so is SGLang's transfer operators for Hopper, where
installed; OUT/peers.tar.xz, with --peers, is NIXL and Mooncake; OUT/COMMIT names the tree.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.machine import commit
from bench.pack_peers import pack_peers
from specgen_engine.kv.toolchain import ToolchainError, find_toolchain

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "msgspec==0.22.0",
    "pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "nvidia-ml-py",
    "pytest-timeout",
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17)] + ["manylinux2014_x86_64"]


def pack_headers(target: Path) -> int:
    """The CUTLASS headers that kernels/*.cu include, by the compiler's own list, and all of pybind11's."""
    import pybind11

    tools = find_toolchain()
    if tools.nvcc is None or tools.cutlass_include is None:
        raise ToolchainError(tools.missing or "no toolchain")
    needed: set[Path] = set()
    for kernel in ROOT.glob("kernels/*.cu"):
        command = [
            str(tools.nvcc),
            "-M",
            "-std=c++17",
            "-gencode=arch=compute_90a,code=sm_90a",
            f"-I{tools.cutlass_include}",
            str(kernel),
        ]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").split()
        needed |= {Path(word).resolve() for word in listed[1:]}
    root = tools.cutlass_include.resolve()
    for header in needed:
        if header.is_relative_to(root):
            place = target / header.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(header, place)
    shutil.copytree(Path(pybind11.get_include()) / "pybind11", target / "pybind11", dirs_exist_ok=True)
    return sum(1 for path in target.rglob("*") if path.is_file())


def download_command(pip: str) -> list[str]:
    """pip for wheels of the host's Python 3.12; the folder and the names follow."""
    command = [pip, "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    command += ["--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return command


def pack_packages(target: Path, pip: str) -> None:
    """Wheels for the host's Python 3.12, unpacked side by side."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*download_command(pip), "-d", wheels, *PACKAGES], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)


def pack_sgl_kernel(target: Path) -> bool:
    spec = importlib.util.find_spec("sgl_kernel")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).glob("sm90/common_ops*.so")]
    if found:
        shutil.copyfile(found[0], target)
        if shutil.which("strip"):
            subprocess.run(["strip", "--strip-unneeded", str(target)], check=True)
    return bool(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pack_gpu_host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--pip", default=shutil.which("pip") or "pip", help="the pip that downloads wheels")
    parser.add_argument("--peers", action="store_true", help="also NIXL and Mooncake, for the rows beside ours")
    parser.add_argument("--prebuilt", type=Path, help="an extension for the host's Python, should its build fail there")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    try:
        headers = pack_headers(args.out / "include")
        pack_packages(args.out / "site", args.pip)
        if args.peers:
            pack_peers(args.out / "peers.tar.xz", download_command(args.pip))
    except (ToolchainError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.prebuilt is not None:
        (args.out / "prebuilt").mkdir()
        shutil.copyfile(args.prebuilt, args.out / "prebuilt" / args.prebuilt.name)
    (args.out / "COMMIT").write_text((commit() or "unknown") + "\n")
    kernel = pack_sgl_kernel(args.out / "sgl_kernel.so")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(
        f"{headers} headers, sgl_kernel {'packed' if kernel else 'not installed here'}: "
        f"{size / 2**20:.1f} MiB under {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""NIXL and Mooncake for an air-gapped GPU host: what their transports for GPUs of one host need of their wheels.

Called by bench.pack_gpu_host. Of 105 MiB of wheels 17 MiB are left: object stores, etcd's and RDMA's extras go.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = ("nixl-cu13==1.5.1", "mooncake-transfer-engine-cuda13==0.3.14")
NIXL_LIBRARIES, MOONCAKE_LIBRARIES = "nixl_cu13.libs", "mooncake_transfer_engine_cuda13.libs"
ROOTS = (
    "nixl_cu13/*",
    ".nixl_cu13.mesonpy.libs/*.so",
    ".nixl_cu13.mesonpy.libs/plugins/libplugin_UCX.so",
    f"{NIXL_LIBRARIES}/ucx/libuct_cuda.so*",
    f"{NIXL_LIBRARIES}/ucx/libucm_cuda.so*",
    f"{NIXL_LIBRARIES}/ucx/libuct_cma.so*",
    "mooncake/__init__.py",
    "mooncake/engine.so",
    "mooncake/libasio.so",
    "mooncake/libetcd_wrapper.so",
)
# Mooncake wants these from the system; NIXL's wheel has them under names of its own.
SYSTEM_NAMES = {"libibverbs-": "libibverbs.so.1", "libmlx5-": "libmlx5.so.1"}
SYSTEM_NAMES |= {"libcurl-": "libcurl.so.4", "libnuma-": "libnuma.so.1"}


def needed(library: Path) -> list[str]:
    said = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=False).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", said)


def with_dependencies(unpacked: Path) -> set[Path]:
    """The roots and all that they load from the two wheels' library folders."""
    folders = [unpacked / NIXL_LIBRARIES, unpacked / MOONCAKE_LIBRARIES]
    aliases = {alias: next(folders[0].glob(f"{start}*")) for start, alias in SYSTEM_NAMES.items()}
    todo = [path for root in ROOTS for path in unpacked.glob(root) if path.is_file()] + list(aliases.values())
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        todo += [folder / name for folder in folders for name in needed(path) if (folder / name).is_file()]
    for alias, real in aliases.items():
        link = folders[0] / alias
        link.unlink(missing_ok=True)
        link.symlink_to(real.name)
        found.add(link)
    return found


def pack_peers(target: Path, download: list[str]) -> int:
    """Write `target`, a .tar.xz to be unpacked into a folder on PYTHONPATH; returns its size.

    Args:
        download: the pip command that fetches wheels for the host's Python, without names and folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch) / "site"
        subprocess.run([*download, "-d", scratch, *WHEELS], check=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        files = with_dependencies(unpacked)
        with tarfile.open(target, "w:xz") as archive:
            for path in sorted(files):
                if ".so" in path.name and not path.is_symlink() and shutil.which("strip"):
                    # The wheels' repaired libraries lose their own symbols only.
                    subprocess.run(["strip", "--strip-debug", str(path)], check=False, capture_output=True)
                archive.add(path, path.relative_to(unpacked))
    return target.stat().st_size

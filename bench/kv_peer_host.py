"""The far side of a peer library's transfers: memory on the second GPU, registered with NIXL or Mooncake.

    python -m bench.kv_peer_host nixl|mooncake --device 1 --bytes N

Prints one line of JSON (where the memory is, how to reach it) and serves until its standard input ends.
`--device cpu` takes shared host memory instead, for rehearsals.
"""

from __future__ import annotations

import argparse
import base64
import json
import mmap
import os
import sys
from typing import Any

import numpy as np


class HostMemory:
    """Shared memory that the benchmark maps too."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("specgen-peer")
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data
        self.reach = {"path": f"/proc/{os.getpid()}/fd/{self._fd}"}


class GpuMemory:
    """A plain cudaMalloc allocation, which the libraries' and our IPC handles can name."""

    def __init__(self, device: int, size: int) -> None:
        from cupy.cuda import Device, runtime

        Device(device).use()
        self.address = runtime.malloc(size)
        self.reach = {"handle": runtime.ipcGetMemHandle(self.address).hex()}


def register_nixl(address: int, size: int, device: str) -> tuple[Any, dict[str, str]]:
    from bench.kv_peers import nixl_agent

    agent = nixl_agent("lender")
    kind, ordinal = ("DRAM", 0) if device == "cpu" else ("VRAM", int(device))
    agent.register_memory([(address, size, ordinal, "")], kind)
    return agent, {"metadata": base64.b64encode(agent.get_agent_metadata()).decode()}


def register_mooncake(address: int, size: int, device: str) -> tuple[Any, dict[str, str]]:
    from bench.kv_peers import mooncake_engine

    engine = mooncake_engine(on_gpu=device != "cpu")
    if (status := engine.register_memory(address, size)) != 0:
        raise RuntimeError(f"Mooncake's register_memory answers {status}")
    return engine, {"segment": f"127.0.0.1:{engine.get_rpc_port()}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_peer_host", description=__doc__)
    parser.add_argument("library", choices=("nixl", "mooncake"))
    parser.add_argument("--device", default="1")
    parser.add_argument("--bytes", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries log to standard output
    memory = HostMemory(args.bytes) if args.device == "cpu" else GpuMemory(int(args.device), args.bytes)
    register = register_nixl if args.library == "nixl" else register_mooncake
    try:
        keep, reach = register(memory.address, args.bytes, args.device)
    except (ImportError, OSError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return 1
    print(json.dumps({"address": memory.address} | memory.reach | reach), file=answers, flush=True)
    sys.stdin.read()
    del keep
    return 0


if __name__ == "__main__":
    sys.exit(main())

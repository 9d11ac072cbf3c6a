"""NIXL and Mooncake moving the pages that our rows move: between the rig's pool and a process that owns memory on the
second GPU. Both are driven by the host, so their rows are timed by its clock, until the bytes have arrived; page lists
are made beforehand."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.kv_methods import Move, NotHere, address_lists
from bench.kv_rig import Rig, Tables

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "nixl": (("nixl._api", "nixl_cu13._api"), "nixl-cu13"),
    "mooncake": (("mooncake.engine",), "mooncake-transfer-engine-cuda13"),
}
MOST_ENTRIES = 2048
LONGEST_S = 15.0


def load(library: str) -> Any:
    """The library's module. Raises NotHere naming the package, or the reason it can't be imported."""
    names, package = PACKAGES[library]
    for name in names:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            raise NotHere(f"{package} can't be imported here: {str(error).splitlines()[0]}") from None
    raise NotHere(f"{package} isn't installed")


def nixl_agent(name: str) -> Any:
    api = load("nixl")
    return api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))


def mooncake_engine(on_gpu: bool) -> Any:
    """On GPUs by its transport for NVLink within a host, else by TCP. Raises RuntimeError when it doesn't start."""
    if on_gpu:
        os.environ["MC_INTRANODE_NVLINK"] = "1"
    engine = load("mooncake").TransferEngine()
    protocol = "nvlink_intra" if on_gpu else "tcp"
    if (status := engine.initialize("127.0.0.1", "P2PHANDSHAKE", protocol, "")) != 0:
        raise RuntimeError(f"Mooncake's initialize answers {status} for {protocol}")
    return engine


class FarMemory:
    """A process that owns the memory, and that memory mapped here for looking at what arrived."""

    def __init__(self, library: str, on_gpu: bool, size: int) -> None:
        command = [sys.executable, "-m", "bench.kv_peer_host", library, "--bytes", str(size)]
        command += ["--device", "1" if on_gpu else "cpu"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.said: dict[str, Any] = json.loads(line) if line else {"error": "the process ended without a word"}
        if "error" in self.said:
            self.close()
            raise NotHere(f"{library} on the far side: {self.said['error']}")
        self.address: int = self.said["address"]
        self.base = self._map_gpu() if on_gpu else self._map_host(size)

    def _map_gpu(self) -> int:
        from cupy.cuda import runtime

        return int(runtime.ipcOpenMemHandle(bytes.fromhex(self.said["handle"])))

    def _map_host(self, size: int) -> int:
        descriptor = os.open(self.said["path"], os.O_RDWR)
        self._map = mmap.mmap(descriptor, size)
        os.close(descriptor)
        return int(np.frombuffer(self._map, np.uint8).ctypes.data)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


class NixlPeer:
    """One agent for the whole benchmark; a transfer request for each set of page tables."""

    def __init__(self, on_gpu: bool, size: int) -> None:
        self._agent = nixl_agent("borrower")
        self._kind = "VRAM" if on_gpu else "DRAM"
        self.far = FarMemory("nixl", on_gpu, size)
        self._remote = self._agent.add_remote_agent(base64.b64decode(self.far.said["metadata"]))
        self._far_ordinal = 1 if on_gpu else 0
        self._registered: Any = None

    def attach(self, rig: Rig) -> None:
        pool = (rig.pool.data_ptr(), rig.pool.numel(), rig.device.index or 0, "")
        self._registered = self._agent.register_memory([pool], self._kind)

    def detach(self) -> None:
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
        self._registered = None

    def mover(self, rig: Rig, direction: str, sets: Sequence[Tables]) -> Move:
        requests = {id(tables): self._request(rig, direction, tables) for tables in sets}

        def move(tables: Tables, stream: int) -> None:
            request = requests[id(tables)]
            state, deadline = self._agent.transfer(request), time.monotonic() + LONGEST_S
            while state == "PROC" and time.monotonic() < deadline:
                state = self._agent.check_xfer_state(request)
            if state != "DONE":
                raise RuntimeError(f"NIXL's transfer is {state} at its end or after {LONGEST_S} s")

        return move

    def _request(self, rig: Rig, direction: str, tables: Tables) -> Any:
        targets, sources, sizes = address_lists(rig, direction, tables, self.far.address)
        near, far = (sources, targets) if direction == "push" else (targets, sources)
        lists = [
            self._agent.get_xfer_descs(
                np.stack([side, sizes, np.full(len(side), ordinal, np.uint64)], axis=1), self._kind
            )
            for side, ordinal in ((near, rig.device.index or 0), (far, self._far_ordinal))
        ]
        return self._agent.initialize_xfer("WRITE" if direction == "push" else "READ", *lists, self._remote)


class MooncakePeer:
    """One transfer engine for the whole benchmark."""

    def __init__(self, on_gpu: bool, size: int) -> None:
        self._engine = mooncake_engine(on_gpu)
        self.far = FarMemory("mooncake", on_gpu, size)
        self._pool = 0

    def attach(self, rig: Rig) -> None:
        self._pool = rig.pool.data_ptr()
        if (status := self._engine.register_memory(self._pool, rig.pool.numel())) != 0:
            raise RuntimeError(f"Mooncake's register_memory answers {status}")

    def detach(self) -> None:
        if self._pool:
            self._engine.unregister_memory(self._pool)
        self._pool = 0

    def mover(self, rig: Rig, direction: str, sets: Sequence[Tables]) -> Move:
        lists = {}
        for tables in sets:
            targets, sources, sizes = address_lists(rig, direction, tables, self.far.address)
            near, far = (sources, targets) if direction == "push" else (targets, sources)
            lists[id(tables)] = (near.tolist(), far.tolist(), sizes.tolist())
        verb = "batch_transfer_sync_write" if direction == "push" else "batch_transfer_sync_read"
        transfer = getattr(self._engine, verb)

        def move(tables: Tables, stream: int) -> None:
            if (status := transfer(self.far.said["segment"], *lists[id(tables)])) != 0:
                raise RuntimeError(f"Mooncake's {verb} answers {status}")

        return move


Peer = NixlPeer | MooncakePeer


class Peers:
    """The peer libraries that work here, started once; why each other one doesn't."""

    def __init__(self, on_gpu: bool, size: int, wanted: Sequence[str]) -> None:
        self.running: dict[str, Peer] = {}
        self.missing: dict[str, str] = {}
        self.wanted = tuple(wanted)
        for name in wanted:
            kind = NixlPeer if name == "nixl" else MooncakePeer
            try:
                self.running[name] = kind(on_gpu, size)
            except NotHere as error:
                self.missing[name] = str(error)
            except Exception as error:  # a foreign library may raise anything: its row says what
                self.missing[name] = f"failed to start: {type(error).__name__}: {str(error).splitlines()[0]}"

    def attach(self, rig: Rig) -> None:
        for name, peer in list(self.running.items()):
            try:
                peer.attach(rig)
            except Exception as error:
                self.missing[name] = f"failed to register the pool: {type(error).__name__}: {error}"
                self.running.pop(name).far.close()

    def detach(self) -> None:
        for peer in self.running.values():
            peer.detach()

    def close(self) -> None:
        for peer in self.running.values():
            peer.far.close()

    def mover(self, name: str, rig: Rig, direction: str, sets: Sequence[Tables]) -> Move:
        """Raises NotHere."""
        if name in self.missing:
            raise NotHere(self.missing[name])
        entries = len(sets[0]) * len(rig.planes)
        if entries > MOST_ENTRIES:
            raise NotHere(f"{entries} entries a transfer: not tried beyond {MOST_ENTRIES}")
        return self.running[name].mover(rig, direction, sets)

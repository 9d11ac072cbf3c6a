"""`specgen lend`: an evaluator's process that lends spare memory of its GPU to servers on the same host."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import NamedTuple

from specgen_engine.config import KvConfig
from specgen_engine.kv.__main__ import answer
from specgen_engine.kv.base import Backend, KvError
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import Lender, private_directory
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.tier.base import TierError

RESERVE_BYTES = 4 << 30  # what an evaluation may need before it asks for lent memory back
UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Offer(NamedTuple):
    """`chunks` of `chunk_bytes`, out of `free_bytes` that the device had."""

    chunks: int
    chunk_bytes: int
    free_bytes: int


def parse_bytes(text: str) -> int | None:
    """Bytes of `24GiB`, `500MB`, `1000000`; None for `auto`. Raises TierError."""
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        raise TierError(f"--specgen-kv-lend {text!r}: use auto or a size such as 24GiB, 500MB or 1000000")
    return int(float(match.group(1)) * unit)


def plan_offer(wanted: int | None, free_bytes: int, chunk_bytes: int, reserve: int = RESERVE_BYTES) -> Offer:
    """How much to lend of what is free. Raises TierError naming what fits when that is less than wanted, or nothing."""
    spare = free_bytes - (reserve if wanted is None else 0)
    lent = spare if wanted is None else wanted
    fits = max(0, spare) // chunk_bytes
    if lent > spare or lent < chunk_bytes:
        asked = "auto" if wanted is None else f"{wanted} bytes"
        raise TierError(
            f"--specgen-kv-lend {asked}: the device has {free_bytes / 2**30:.2f} GiB free"
            + (f", {reserve / 2**30:.0f} of them kept for evaluations" if wanted is None else "")
            + f"; what fits is 1 to {fits} chunks of {chunk_bytes >> 20} MiB, {fits * chunk_bytes} bytes"
        )
    return Offer(lent // chunk_bytes, chunk_bytes, free_bytes)


def free_memory(backend: str, device: int) -> int:
    """Bytes that are free on the GPU by NVML, or in the host's shared memory for loopback. Raises TierError."""
    if backend == "loopback":
        import psutil

        return int(psutil.virtual_memory().available)
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(device)).free)
    except Exception as error:
        raise TierError(f"--device {device}: NVML does not say how much memory is free there ({error})") from None


def lend(
    size: str, device: int, backend: str = "cuda", directory: Path | None = None, chunk_mib: int = 64, name: str = ""
) -> int:
    """Lend until SIGTERM, or until a pipe on stdin ends or says close; commands as in `python -m specgen_engine.kv`.

    Raises TierError for a size that can't be lent, naming what fits; for a directory or a name that can't be used.
    """
    if "/" in name or name.startswith("."):
        raise TierError(f"--name {name}: names a socket in its folder; use one without / and without a dot first")
    wanted = parse_bytes(size)
    offer = plan_offer(wanted, free_memory(backend, device), chunk_mib << 20)
    folder = _usable(KvConfig(directory=directory).socket_directory)
    try:
        memory: Backend = LoopbackBackend() if backend == "loopback" else CudaBackend(device)
    except KvError as error:
        raise TierError(f"--specgen-kv-lend {size}: {error}") from None
    try:
        lender = Lender(folder, name or f"{backend}{device}", memory, offer.chunk_bytes, offer.chunks)
    except KvError as error:
        raise TierError(f"--directory, --name: {error}") from None
    print(json.dumps({"ready": str(lender.path), **offer._asdict()}), flush=True)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _obey(lender)
    except KeyboardInterrupt:
        pass
    lender.close()
    return 0


def _usable(folder: Path) -> Path:
    """Made, or found, with mode 700. Raises TierError."""
    try:
        return private_directory(folder)
    except FileExistsError:
        raise TierError(f"--directory {folder}: is no folder; name one, or one that can be made") from None
    except OSError as error:
        raise TierError(f"--directory {folder}: {error.strerror}; name a folder that can be made") from None
    except KvError as error:
        raise TierError(f"--directory: {error}") from None


def _obey(lender: Lender) -> None:
    if not (sys.stdin.isatty() or stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode)):
        threading.Event().wait()  # a service: nobody talks to it
    for line in sys.stdin:
        if line.split()[:1] == ["close"]:
            return
        try:
            print(json.dumps(answer(lender, line)), flush=True)
        except (KvError, ValueError) as error:
            print(json.dumps({"error": str(error)}), flush=True)

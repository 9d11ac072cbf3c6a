"""`python -m specgen_engine.kv`: a lender alone, told what to do by lines on stdin, answering in JSON lines on stdout.

Commands: `counts`, `epochs`, `revoke EPOCH COUNT|all BOUND_S`, `quiet DURATION_S`, `close`; so is the end of stdin.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from specgen_engine.kv.base import Backend, KvError
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend


def answer(lender: Lender, line: str) -> dict[str, object]:
    """Carry out one command. Raises KvError or ValueError for a command that makes no sense."""
    command, *words = line.split()
    if command == "counts":
        return lender.check_integrity()._asdict()
    if command == "epochs":
        return dict(lender.epochs())
    if command == "revoke" and len(words) == 3:
        count = None if words[1] == "all" else int(words[1])
        return lender.revoke(int(words[0]), count, float(words[2]))._asdict()
    if command == "quiet" and len(words) == 1:
        with lender.quiet(float(words[0])) as reached:
            time.sleep(float(words[0]))
        return {"reached": reached}
    raise KvError(
        f"command {line.strip()!r}: use counts, epochs, revoke EPOCH COUNT|all BOUND_S, quiet DURATION_S, close"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m specgen_engine.kv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="holds the socket; made with mode 700")
    parser.add_argument("--name", default="lender")
    parser.add_argument("--backend", choices=("loopback", "cuda"), default="cuda")
    parser.add_argument("--device", type=int, default=0, help="CUDA ordinal of the GPU whose memory is lent")
    parser.add_argument("--chunk-mib", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--lease-s", type=float, default=10.0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        backend: Backend = LoopbackBackend() if args.backend == "loopback" else CudaBackend(args.device)
        lender = Lender(args.directory, args.name, backend, args.chunk_mib << 20, args.chunks, args.lease_s)
    except KvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"ready": str(lender.path)}), flush=True)
    for line in sys.stdin:
        if line.split()[:1] == ["close"]:
            break
        try:
            print(json.dumps(answer(lender, line)), flush=True)
        except (KvError, ValueError) as error:
            print(json.dumps({"error": str(error)}), flush=True)
    lender.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The servers and the lender of bench.kv_tier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from bench.kv_tier_client import Client
from specgen_engine.errors import SpecGenError
from specgen_engine.serving.command import prepare
from specgen_engine.serving.process import running_server

CHUNK_MIB, CPU_CHUNK_MIB = 64, 1
SMOLLM2_BYTES = 2 * 4 * 30 * 3 * 64  # a token's KV in float32
STARVED = 4  # searches need so many times the pool
# What each measurement leaves in the second level, in longest prefixes; searches begin with an empty one.
LEFT = {"alone": 2.2, "crowd": 2.1, "decodes": 1.5}
SECOND_LEVEL = 4.7  # longest prefixes that the lender and HiCache's host pool hold at most
START_S = 220
GPU_ARGUMENTS = (
    *("--load-format", "dummy", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--skip-server-warmup"),
    *("--mem-fraction-static", "0.85", "--disable-custom-all-reduce", "--cuda-graph-backend-prefill", "disabled"),
    *("--max-running-requests", "64", "--cuda-graph-max-bs-decode", "64", "--random-seed", "1"),
    *("--specgen-evaluation-device", "cpu"),
)


class Options(NamedTuple):
    """`longest`: tokens of the longest prefix; the pool holds a little more."""

    model: Path | None
    backend: str
    attention_backend: str
    longest: int
    logs: Path
    measures: tuple[str, ...] = ()


def start_servers(stack: ExitStack, options: Options) -> dict[str, Future[Client]]:
    """{level: client, once its server is up} for the tier, `off` (for searches only) and `host`; all start at once.

    A future raises SpecGenError with the log's last error. On GPUs the tier's server and `off` share GPU 0, the lender
    and `host` GPU 1; on a CPU there is no `host`: SGLang's own host pool has no CPU kernels.
    """
    options.logs.mkdir(parents=True, exist_ok=True)
    pool = pool_tokens(options.longest)
    cpu = options.backend == "loopback"
    chunk_mib = CPU_CHUNK_MIB if cpu else CHUNK_MIB
    second = second_level_tokens(options.longest, options.measures) * (
        SMOLLM2_BYTES if cpu else kv_bytes_per_token(options.model)
    )
    socket = stack.enter_context(lender(options, f"{second // 2**30 + 1}GiB", chunk_mib)).folder
    tier = ["--specgen-kv", options.backend, "--specgen-kv-directory", str(socket)]
    tier += ["--specgen-kv-chunk-mib", str(chunk_mib)]
    host = ["--specgen-kv", "host", "--hicache-size", str(min(second // 10**9 + 1, host_gb()))]
    levels = {options.backend: (0, tier)}
    if "searches" in options.measures:
        levels["off"] = (0, [])
    if not cpu:
        levels["host"] = (1, host)
    threads = ThreadPoolExecutor(len(levels))
    started = {
        level: threads.submit(_start, stack, options, level, gpu, pool, arguments)
        for level, (gpu, arguments) in levels.items()
    }
    stack.callback(threads.shutdown)  # a server that comes up after a failure is then closed like the others
    return started


def second_level_tokens(longest: int, measures: Sequence[str]) -> int:
    """No more than is needed: pinning host memory takes more than a second a GB on some hosts."""
    searches = STARVED * pool_tokens(longest) * 1.05 if "searches" in measures else 0.0  # a twentieth for answers
    return int(max(searches, longest * min(SECOND_LEVEL, sum(LEFT.get(name, 0.0) for name in measures))))


def pool_tokens(longest: int) -> int:
    """KV of each server: the longest prefix and a little more."""
    return longest + max(96, longest // 16)


def gpu_beside(serving: int = 0) -> int:
    """The first GPU that does not serve. On a host with one it is the same: every path of the tier, but no NVLink."""
    import pynvml

    pynvml.nvmlInit()
    try:
        return next((gpu for gpu in range(pynvml.nvmlDeviceGetCount()) if gpu != serving), serving)
    finally:
        pynvml.nvmlShutdown()


class LenderProcess:
    """A lender, told what to do by lines. `folder` holds its socket."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder = folder
        self._process = process

    def tell(self, command: str) -> dict[str, int]:
        """The answer to a command of `python -m specgen_engine.kv`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def lender(options: Options, size: str, chunk_mib: int, gpu: int = 1) -> Iterator[LenderProcess]:
    """A lender process, gone when left."""
    folder = Path(tempfile.mkdtemp(prefix="specgen-kv-"))
    backend = "loopback" if options.backend == "loopback" else "cuda"
    command = [sys.executable, "-m", "specgen_engine", "lend", "--specgen-kv-lend", size, "--backend", backend]
    command += ["--directory", str(folder), "--chunk-mib", str(chunk_mib), "--device", str(gpu)]
    with (options.logs / "lender.log").open("w") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            raise SpecGenError(f"the lender ended: {(options.logs / 'lender.log').read_text()[-400:]}")
        print(f"lender: {json.loads(ready)}", flush=True)
        yield LenderProcess(folder, process)
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def _start(stack: ExitStack, options: Options, level: str, gpu: int, pool: int, arguments: list[str]) -> Client:
    words = [*arguments, "--max-total-tokens", str(pool), "--enable-metrics"]
    environment = dict(os.environ)
    if options.backend == "loopback":
        launch = prepare(["--smollm", *words])
        words, environment = launch.arguments, launch.environment
        per_token = SMOLLM2_BYTES
    else:
        words += ["--enable-specgen", "--model-path", str(options.model), *GPU_ARGUMENTS]
        words += ["--attention-backend", options.attention_backend, "--base-gpu-id", str(gpu)]
        per_token = kv_bytes_per_token(options.model)
    server = stack.enter_context(
        running_server(words, options.logs / f"server_{level}.log", environment, timeout_s=START_S)
    )
    print(f"{level}: up in {server.startup_s:.0f} s", flush=True)
    return Client(server.url, per_token)


def host_gb() -> int:
    """Most for HiCache's host pool: SGLang keeps 10 GiB free; some hosts report little memory until it is touched."""
    return int(psutil.virtual_memory().available / 1e9) - 12


def kv_bytes_per_token(model: Path | None) -> int:
    """Of an MHA model in bfloat16, by its configuration. Raises SpecGenError."""
    if model is None or not (model / "config.json").is_file():
        raise SpecGenError(f"--model {model}: give a folder with a config.json and a tokenizer")
    config = json.loads((model / "config.json").read_text())
    return 2 * 2 * int(config["num_hidden_layers"]) * int(config["num_key_value_heads"]) * int(config["head_dim"])

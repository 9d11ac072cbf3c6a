"""`specgen evaluator`: this host's GPUs (or CPU workers) as evaluators of a pool that several servers share, on Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil

from ..errors import SpecGenError
from ..evaluation.limits import EvaluationLimits
from ..observability.machine import describe_machine

UP_S = 60.0


class EvaluatorError(SpecGenError):
    """What was asked for cannot be offered; nothing was started."""


class EvaluatorOptions(NamedTuple):
    """gpus: indices as nvidia-smi counts; or cpus: workers.  join: HOST:PORT of the pool, None for a new one.

    workers, limits, port: of a new pool; workers: processes on one GPU.  journal: of a new pool, None for none.
    metrics_port: where Prometheus finds the pool's series, None for nowhere.
    lend: of a new pool: how much of each GPU's memory servers may use for KV pages (auto, 24GiB, ...), None for none.
    """

    gpus: tuple[int, ...] = ()
    cpus: int = 0
    join: str | None = None
    workers: int = 2
    port: int = 6380
    journal: Path | None = None
    metrics_port: int | None = None
    lend: str | None = None
    limits: EvaluationLimits = EvaluationLimits()


def parse_gpus(text: str) -> tuple[int, ...]:
    """'1,2,3'. Raises EvaluatorError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words):
        raise EvaluatorError(f"--gpus {text}: use indices as nvidia-smi counts them, like 1,2,3")
    indices = tuple(int(word) for word in words)
    if len(set(indices)) < len(indices):
        raise EvaluatorError(f"--gpus {text}: an index is there twice; name each once")
    return indices


def require_gpus(indices: Sequence[int]) -> None:
    """Raises EvaluatorError for an index that this machine does not have, or whose GPU an SGLang server uses."""
    names = describe_machine()["gpu_names"]
    for index in indices:
        if index >= len(names):
            raise EvaluatorError(
                f"--gpus {index}: this machine has {len(names)} GPUs that NVML can see; use lower indices"
            )
        if server := server_on(index):
            raise EvaluatorError(
                f"--gpus {index}: the SGLang server of process {server} uses it; a timed kernel needs its GPU alone, "
                "use another one"
            )


def require_lending(options: EvaluatorOptions) -> None:
    """Raises EvaluatorError or TierError for a size that is none, or where the pool's first evaluator decides."""
    if options.join is not None:
        raise EvaluatorError("--lend: what a pool's GPUs lend is said where it is started; leave it out beside --join")
    from ..tier.lend import parse_bytes

    parse_bytes(options.lend or "")


def server_on(index: int) -> int | None:
    """The process id of an SGLang server with memory on that GPU."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            try:
                words = psutil.Process(process.pid).cmdline()
            except psutil.Error:
                continue
            if any("sglang" in word for word in words):
                return int(process.pid)
    finally:
        pynvml.nvmlShutdown()
    return None


def evaluator(options: EvaluatorOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises EvaluatorError or PoolError before anything is started."""
    if bool(options.gpus) == bool(options.cpus):
        raise EvaluatorError("--gpus, --cpus: name either the GPUs to evaluate on, or a number of CPU workers")
    if options.join is not None and options.limits != EvaluationLimits():
        raise EvaluatorError("--sandbox: a pool's is said where it is started; leave it out beside --join")
    if options.lend is not None:
        require_lending(options)
    if find_spec("ray") is None:
        raise EvaluatorError("a shared pool needs Ray: pip install 'specgen-engine[ray]'")
    if options.gpus:
        require_gpus(options.gpus)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from .journal import Journal
    from .ray_pool import require_answer

    if options.join is not None:
        require_answer(options.join, "--join")
    elif _listens(options.port):
        raise EvaluatorError(f"--port {options.port}: it is taken; --join that pool, or choose another port")
    if options.journal is not None:
        Journal(options.journal).close()
    node = _start_node(options)
    try:
        address = options.join or f"{_own_address()}:{options.port}"
        _connect(address, node)
        _serve(options, address, node)
    finally:
        _stop_node(node)


def _start_node(options: EvaluatorOptions) -> subprocess.Popen[bytes]:
    """A Ray node that offers the evaluators; it lives as long as this process."""
    from .ray_backend import CPU_RESOURCE, GPU_RESOURCE

    offered = {GPU_RESOURCE: len(options.gpus)} if options.gpus else {CPU_RESOURCE: options.cpus}
    where = [f"--address={options.join}"] if options.join else ["--head", f"--port={options.port}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", "--disable-usage-stats"]
    command += ["--num-cpus=0", f"--num-gpus={len(options.gpus)}", f"--resources={json.dumps(offered)}"]
    command += ["--include-dashboard=false", f"--node-ip-address={_own_address(options.join)}"]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, options.gpus))} if options.gpus else {}
    return subprocess.Popen(command, env={**os.environ, **visible}, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def _stop_node(node: subprocess.Popen[bytes]) -> None:
    """At once: Ray would drain a node for half a minute, and what ran here is retried elsewhere anyway."""
    processes = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    for process in [*processes, node]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
    node.wait()


def _connect(address: str, node: subprocess.Popen[bytes]) -> None:
    from .ray_head import connect

    stop = time.monotonic() + UP_S
    while True:
        if node.poll() is not None:
            raise EvaluatorError(f"the Ray node ended with code {node.returncode}; its last words are above")
        try:
            port = int(address.rpartition(":")[2])
            socket.create_connection((address.rpartition(":")[0], port), timeout=1).close()
            connect(address)
            return
        except (OSError, ConnectionError, RuntimeError, ValueError) as error:
            if time.monotonic() > stop:
                raise EvaluatorError(f"the Ray node at {address} is not up after {UP_S:g} s: {error}") from None
            time.sleep(0.5)


def _serve(options: EvaluatorOptions, address: str, node: subprocess.Popen[bytes]) -> None:
    import ray

    from .ray_backend import SupervisorOptions
    from .ray_head import start_head

    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    supervisors = SupervisorOptions(options.limits, options.workers, lend=options.lend or "")
    head = start_head(options.journal, supervisors)
    if options.metrics_port is not None:
        _serve_metrics(options.metrics_port, head)
    what = f"GPUs {','.join(map(str, options.gpus))}" if options.gpus else f"{options.cpus} CPU workers"
    print(f"evaluating on {what}; the pool's address is {address}", flush=True)
    while not over.wait(1.0):
        if node.poll() is not None:
            raise EvaluatorError(f"the Ray node ended with code {node.returncode}")
    if options.join is None:  # the pool ends with the node that it lives on
        ray.get(head.close.remote(), timeout=15)


def _serve_metrics(port: int, head: object) -> None:
    """GET /metrics of the whole pool."""
    import http.server

    import ray

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = ray.get(head.metrics.remote(), timeout=10)  # type: ignore[attr-defined]
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    try:
        server = http.server.ThreadingHTTPServer(("", port), Handler)
    except OSError as error:
        raise EvaluatorError(f"--metrics-port {port}: {error.strerror}; choose another") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _own_address(towards: str | None = None) -> str:
    """This host's address as another host sees it; loopback where there is no network, or the pool is on it."""
    host = towards.rpartition(":")[0] if towards else "192.0.2.1"
    if host in ("127.0.0.1", "localhost"):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"

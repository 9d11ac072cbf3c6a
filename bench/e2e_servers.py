"""The server and the lender of bench.end_to_end, on GPUs or on SGLang's CPU engine."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.e2e_configurations import server_arguments, workers_of
from bench.kv_tier_servers import CHUNK_MIB, Options, lender
from specgen_engine.errors import SpecGenError
from specgen_engine.serving.command import prepare
from specgen_engine.serving.process import Server, running_server

CPU_LAYERS = 2
GPU_ARGUMENTS = (
    *("--load-format", "dummy", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--skip-server-warmup"),
    *("--disable-custom-all-reduce", "--cuda-graph-backend-prefill", "disabled", "--random-seed", "1"),
    *("--max-running-requests", "64", "--cuda-graph-max-bs-decode", "64"),
)
# With the default of 8 splits a step's time grew with the longest context by 0.75 ms per 1,000 tokens on an H200.
TRITON_ARGUMENTS = ("--triton-attention-num-kv-splits", "64")
# Forks of many searches at once, and answers of up to 4,600 tokens.
FORK_ARGUMENTS = ("--specgen-fork-total", "32", "--specgen-fork-max-tokens", "8192")


@dataclass(frozen=True, slots=True)
class Gpus:
    """serve: the engine's; evaluate: the evaluators', the same one in time-shared use; None: everything on the CPU."""

    serve: int | None
    evaluate: tuple[int, ...] = ()

    @property
    def evaluators(self) -> int:
        return max(1, len(self.evaluate))

    @property
    def shared(self) -> bool:
        """Whether an evaluator takes turns with the engine on its GPU."""
        return self.serve in self.evaluate

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """`serve=0,eval=1,2,3` or `cpu`. Raises SpecGenError."""
        if text == "cpu":
            return cls(None)
        match = re.fullmatch(r"serve=(\d+),eval=(\d+(?:,\d+)*)", text)
        if not match:
            raise SpecGenError(f"--gpus {text!r}: write serve=0,eval=1,2,3 (the same number twice: shared), or cpu")
        evaluate = tuple(int(number) for number in match[2].split(","))
        if len(set(evaluate)) != len(evaluate):
            raise SpecGenError(f"--gpus {text!r}: an evaluator is named twice")
        return cls(int(match[1]), evaluate)


@dataclass(frozen=True, slots=True)
class Setup:
    """model: a folder with config.json and tokenizer; traces: task folders; logs: where servers write.

    workers: evaluations at once on each evaluator GPU (compiling, checking; timing has its GPU to itself).
    pool_tokens: KV pool's size, None for what fits. lend_gib: what each evaluator lends to the KV tier.
    """

    model: Path | None
    traces: tuple[Path, ...]
    gpus: Gpus
    logs: Path
    workers: int
    attention_backend: str = "triton"
    profile: str = "off"
    pool_tokens: int | None = None
    lend_gib: int = 16
    tier: str = "off"


def host_size(words: list[str], lend_gib: int) -> list[str]:
    """HiCache's host pool is as large as what a peer lends; by default it pins twice the GPU's KV pool."""
    return ["--hicache-size", str(math.ceil(lend_gib * 2**30 / 1e9))] if "host" in words else []


@contextmanager
def server(setup: Setup, variant: str, cache: Path) -> Iterator[Server]:
    """A server of this variant, with its lender where it needs one. Raises SpecGenError with the log's last error."""
    setup.logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        words = [*server_arguments(variant, setup.tier), *FORK_ARGUMENTS]
        words += host_size(words, setup.lend_gib)
        words += ["--specgen-replay", *(str(path.resolve()) for path in setup.traces)]
        words += ["--specgen-evaluation-cache", str(cache), "--specgen-evaluation-profile", setup.profile]
        words += ["--specgen-evaluation-workers", str(workers_of(variant, setup.workers))]
        if "peer" in words:
            options = Options(setup.model, "cuda", setup.attention_backend, 0, setup.logs)
            gpu = next((number for number in setup.gpus.evaluate if number != setup.gpus.serve), None)
            if gpu is None:
                raise SpecGenError("--tier peer: the only evaluator is the serving GPU; use --tier host or off")
            lent = stack.enter_context(lender(options, f"{setup.lend_gib}GiB", CHUNK_MIB, gpu))
            words += ["--specgen-kv-directory", str(lent.folder), "--specgen-kv-chunk-mib", str(CHUNK_MIB)]
        if setup.pool_tokens:
            words += ["--max-total-tokens", str(setup.pool_tokens)]
        words, environment = _on_cpu(words) if setup.gpus.serve is None else _on_gpu(setup, words)
        log = setup.logs / f"server_{variant}.log"
        yield stack.enter_context(running_server(words, log, environment, timeout_s=400))


def _on_cpu(words: list[str]) -> tuple[list[str], dict[str, str]]:
    launch = prepare(["--tiny-layers", str(CPU_LAYERS), *words])
    return launch.arguments, launch.environment


def _on_gpu(setup: Setup, words: list[str]) -> tuple[list[str], dict[str, str]]:
    if setup.model is None or not (setup.model / "config.json").is_file():
        raise SpecGenError(f"--model {setup.model}: give a folder with a config.json and a tokenizer")
    serve, evaluate = setup.gpus.serve, setup.gpus.evaluate
    words = ["--enable-specgen", "--model-path", str(setup.model), *GPU_ARGUMENTS, *words]
    words += ["--base-gpu-id", str(serve), "--attention-backend", setup.attention_backend]
    if setup.attention_backend == "triton":
        words += TRITON_ARGUMENTS
    words += ["--mem-fraction-static", "0.6" if setup.gpus.shared else "0.85"]
    words += ["--specgen-evaluation-device", ",".join(f"cuda:{number}" for number in evaluate)]
    return words, dict(os.environ)

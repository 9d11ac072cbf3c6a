"""The servers of bench.models: a case is a model in a mode."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args

from bench.kv_tier_servers import LenderProcess, gpu_beside
from bench.kv_tier_servers import lender as lender_process
from bench.models_client import Client
from specgen_engine.errors import SpecGenError
from specgen_engine.models import invariant
from specgen_engine.models.base import Facts, facts_of, server_arguments
from specgen_engine.models.folders import write_folder
from specgen_engine.models.weights import SCALED, SWITCH
from specgen_engine.modes import TRY
from specgen_engine.serving.command import prepare
from specgen_engine.serving.process import running_server

Mode = Literal[
    "plain", "fp32-head", "invariant", "fp8", "mtp", "mtp-accepted", "tp2", "tp2-mtp", "tier", "invariant-tier",
    "invariant-mtp", "tp2-invariant", "mtp-tier", "mtp-accepted-tier", "dp2",
]  # fmt: skip
MODES: tuple[Mode, ...] = get_args(Mode)
GPU_ARGUMENTS = (
    *("--load-format", "dummy", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--skip-server-warmup"),
    *("--disable-custom-all-reduce", "--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "24"),
    *("--max-running-requests", "48", "--random-seed", "1", "--sleep-on-idle", "--specgen-evaluation-device", "cpu"),
)
FORK_ARGUMENTS = (
    "--specgen-fork-per-search",
    "8",
    "--specgen-fork-total",
    "64",
    "--specgen-scheduler-batch-share",
    "1",
)
MTP = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
)
# FlashInfer's fused all-reduce, which SGLang turns on for GLM-5, sets up multicast memory: a start waited three minutes
# for it on two H200, another one until it was ended.
TP2 = ("--tp-size", "2", "--enforce-disable-flashinfer-allreduce-fusion")
DP2 = (*TP2, "--dp-size", "2", "--enable-dp-attention")
# Random weights accept none of their own drafts. SGLang takes the first two of three for right here, and writes them.
ACCEPTED = {"SGLANG_SIMULATE_ACC_LEN": "3", "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token"}
UNTESTED = "speculative decoding with a chain of drafts (MTP, EAGLE);data parallel attention"
STRICT = "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"
TIER_POOL, FORK_POOL = 147_456, 131_072
LENT = "3GiB"
CHUNK_MIB = 64


class Case(NamedTuple):
    """`model`: a name of specgen_engine.models, or `tiny` on the CPU engine."""

    model: str
    mode: Mode
    gpu: int

    @property
    def name(self) -> str:
        return f"{self.model}:{self.mode}"

    @property
    def has_tier(self) -> bool:
        return self.mode.endswith("tier")

    @property
    def is_invariant(self) -> bool:
        return "invariant" in self.mode


class Running(NamedTuple):
    """A case's server; `lender` with the tier. `startup_s`: from launch to the first healthy answer."""

    case: Case
    client: Client
    log: Path
    startup_s: float
    lender: LenderProcess | None


def case_of(text: str) -> Case:
    """MODEL:MODE or MODEL:MODE@GPU. Raises SpecGenError."""
    words, _, gpu = text.partition("@")
    model, _, mode = words.partition(":")
    if model != "tiny":
        facts_of(model)
    for known in MODES:
        if known == (mode or "plain"):
            return Case(model, known, int(gpu or 0))
    raise SpecGenError(f"case {text!r}: mode {mode!r} is none of {', '.join(MODES)}")


def start(stack: ExitStack, case: Case, logs: Path, timeout_s: float) -> Running:
    """Start a case's server, with the tier its lender on the other GPU, where there is one.

    Raises SpecGenError with the log's error.
    """
    logs.mkdir(parents=True, exist_ok=True)
    lender: LenderProcess | None = None
    tier: tuple[str, ...] = ()
    if case.has_tier:
        lender, tier = _start_lender(stack, case, logs)
    words, environment = _cpu(tier) if case.model == "tiny" else _gpu(case, stack, tier)
    log = logs / f"server_{case.model}_{case.mode}.log"
    server = stack.enter_context(running_server(words, log, environment, timeout_s=timeout_s))
    return Running(case, Client(server.url), log, server.startup_s, lender)


def _start_lender(stack: ExitStack, case: Case, logs: Path) -> tuple[LenderProcess, tuple[str, ...]]:
    cpu = case.model == "tiny"
    backend, chunk, gpu = ("loopback", 1, 0) if cpu else ("peer", CHUNK_MIB, gpu_beside(case.gpu))
    options: Any = SimpleNamespace(backend=backend, logs=logs)
    one = stack.enter_context(lender_process(options, "64MiB" if cpu else LENT, chunk, gpu=gpu))
    arguments = ("--specgen-kv", backend, "--specgen-kv-directory", str(one.folder))
    return one, (*arguments, "--specgen-kv-chunk-mib", str(chunk))


def _cpu(tier: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    pool = ("--max-total-tokens", "3072" if tier else "16384")  # the tier's restores need one that evicts
    launch = prepare(["--tiny", *FORK_ARGUMENTS, *tier, *pool])
    return launch.arguments, {**launch.environment, STRICT: "1", SWITCH: SCALED}


def _gpu(case: Case, stack: ExitStack, tier: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    facts = facts_of(case.model)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="specgen-model-")))
    write_folder(facts, folder)
    fp8 = case.mode == "fp8"
    pool = TIER_POOL if case.has_tier else FORK_POOL
    words = ["--enable-specgen", "--model-path", str(folder), *GPU_ARGUMENTS, *FORK_ARGUMENTS, *tier]
    words += server_arguments(facts, "fp8_e4m3" if fp8 else "bfloat16")
    words += ["--reasoning-parser", facts.reasoning_parser, "--max-total-tokens", str(pool)]
    words += ["--mem-fraction-static", "0.85", "--base-gpu-id", str(case.gpu)]
    words += ["--swa-full-tokens-ratio", "0.5"] if facts.attention == "dsv4" else []
    words += TP2 if case.mode.startswith("tp2") else DP2 if case.mode == "dp2" else ()
    words += MTP if "mtp" in case.mode else ()
    words += ["--enable-fp32-lm-head"] if case.mode == "fp32-head" else []
    return words, {**os.environ, **environment_of(facts, case)}


def is_strict(case: Case) -> bool:
    """Accounting checked at every step, except where decoding speed is measured."""
    return case.mode != "plain" or case.model == "tiny"


def environment_of(facts: Facts, case: Case) -> Mapping[str, str]:
    strict = {STRICT: "1"} if is_strict(case) else {}
    of_mode = {
        **(ACCEPTED if case.mode.startswith("mtp-accepted") else {}),
        **(invariant.ENVIRONMENT if case.is_invariant else {}),
    }
    return {**facts.environment, **strict, **of_mode, SWITCH: SCALED, TRY: UNTESTED}

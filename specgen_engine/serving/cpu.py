"""What SGLang 0.5.17's CPU engine needs to come up without a GPU: environment variables and server arguments.

Measured on two cores of an AMD EPYC with AVX-512, sglang 0.5.17, torch 2.11, float32: the
server is up in 63-78 s, nearly all of it three processes importing for 22 s of processor time each; SmolLM2-135M
decodes 13 tokens/s alone and 60 in a batch of eight, the tiny model 190-210 alone and 640 in a batch of eight.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

STUB = Path(__file__).parent / "stub"

# The option's name, and its value or None for a switch. Kernels of the other choices are CUDA; in bfloat16 greedy
# output depends on the batch's size (torch's CPU GEMMs), so forks would change a base by rounding.
DEFAULTS: tuple[tuple[str, str | None], ...] = (
    ("--device", "cpu"),
    ("--attention-backend", "torch_native"),
    ("--sampling-backend", "pytorch"),
    ("--dtype", "float32"),
    ("--max-total-tokens", "32768"),
    ("--max-running-requests", "32"),
    ("--skip-server-warmup", None),
    # Without it an idle scheduler polls on three quarters of a core, which the judging of candidates needs.
    ("--sleep-on-idle", None),
)


def has_option(arguments: Sequence[str], name: str) -> bool:
    """Whether a command line gives an option, in either form (`--name value`, `--name=value`)."""
    return any(argument == name or argument.startswith(f"{name}=") for argument in arguments)


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """The value a command line gives an option, the last one as argparse does; None when absent."""
    value = None
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
        elif argument == name and position + 1 < len(arguments):
            value = arguments[position + 1]
    return value


def cpu_arguments(arguments: Sequence[str]) -> list[str]:
    """The user's launch_server arguments with what a CPU needs added; an option that the user gives is left alone."""
    complete = list(arguments)
    for name, value in DEFAULTS:
        if not has_option(arguments, name):
            complete += [name] if value is None else [name, value]
    return complete


def cpu_environment(
    environ: Mapping[str, str] | None = None,
    *,
    page_size: int = 1,
    model_module: str | None = None,
    tp_size: int = 1,
) -> dict[str, str]:
    """A copy of `environ` (default: this process's) in which the CPU engine runs; hand it to the server's process.

    `page_size` in tokens: above 1 the paged allocator's Triton kernels run in Triton's interpreter. `model_module`
    names the one file in SGLang's models/ to register ("llama"); the other two hundred are then not imported (about 4 s
    less start-up). `tp_size`: its ranks share this machine's cores in turn; SGLang asks for a list where there are
    more ranks than NUMA nodes, and reduces over gloo.
    """
    if page_size < 1:
        raise ValueError(f"page_size: {page_size} must be 1 or more")
    variables = dict(os.environ if environ is None else environ)
    inherited = [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(STUB)]
    variables["PYTHONPATH"] = os.pathsep.join([str(STUB), *inherited])
    variables["SGLANG_USE_CPU_ENGINE"] = "1"
    # A second OpenMP thread gains little alone, and spins for its turn whenever an evaluation has the other core:
    # 13 tokens/s instead of 75 for three requests of the tiny model beside one compile.
    variables.setdefault("OMP_NUM_THREADS", "1")
    if tp_size > 1:
        cores = sorted(os.sched_getaffinity(0))
        shares = (cores[rank::tp_size] or cores[:1] for rank in range(tp_size))
        bound = "|".join(",".join(map(str, share)) for share in shares)
        variables.setdefault("SGLANG_CPU_OMP_THREADS_BIND", bound)
        # SGLang sets up NCCL wherever its library loads, also for ranks on a CPU: name one that does not.
        variables["SGLANG_NCCL_SO_PATH"] = "none-on-a-cpu"
    if page_size > 1:
        variables["TRITON_INTERPRET"] = "1"
    if model_module is not None:
        variables["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(_other_models(model_module))
    return variables


def _other_models(kept: str) -> list[str]:
    from importlib.util import find_spec

    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("sglang is not installed: pip install 'sglang>=0.5.17,<0.6'")
    folder = Path(next(iter(spec.submodule_search_locations))) / "srt" / "models"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
    if kept not in modules:
        raise ValueError(f"model_module: SGLang has no models/{kept}.py")
    return sorted(modules - {kept})

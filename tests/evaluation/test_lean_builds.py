"""C++ candidates are built with lean headers first, and with torch's own where those lack a name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch.utils.cpp_extension as extension

from specgen_engine.evaluation.base import Status
from specgen_engine.evaluation.buildcache import NOTE
from specgen_engine.evaluation.builds import lean
from specgen_engine.kv.toolchain import find_nvcc

from .conftest import module

CALLS = """#!/bin/sh
echo "$CPATH|$*" >>calls
[ -z "$CPATH" ] || {{ printf '%s\\n' "{lean}"; exit {code}; }}
echo torch\\'s own
exit 3
"""
WORDS = {
    "built": ("[2/2] done", 0, 1),
    "g++ misses a member": ("a.cpp:3:5: error: 'nn' is not a member of 'torch'", 1, 2),
    "g++ misses a name": ("a.cpp:3:5: error: 'einsum' was not declared in this scope", 1, 2),
    "nvcc misses a member": ('a.cu(3): error: namespace \\"torch\\" has no member \\"nn\\"', 1, 2),
    "nvcc misses a name": ('a.cu(3): error: identifier \\"einsum\\" is undefined', 1, 2),
    "a syntax error": ('a.cu(3): error: expected a \\";\\"', 1, 1),
}


@pytest.mark.parametrize("name", WORDS)
def test_only_a_missing_name_is_tried_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, code, calls = WORDS[name]
    real = tmp_path / "ninja"
    real.write_text(CALLS.format(lean=said, code=code))
    real.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    environment = {**os.environ, **lean.environment()}
    done = subprocess.run(
        ["ninja", "-v"], env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = (tmp_path / "calls").read_text().splitlines()
    assert log == [f"{lean.HEADERS}|-v", "|-v"][:calls]
    assert done.returncode == (code if calls == 1 else 3)
    assert done.stdout.strip() == (said.replace("\\", "") if calls == 1 else "torch's own")


@pytest.mark.parametrize("changed", ["nothing", "main.cpp", "build.ninja", "library.so", "note", "main.o"])
def test_a_library_that_was_moved_is_built_again_only_where_something_differs(tmp_path: Path, changed: str) -> None:
    real = tmp_path / "ninja"
    real.write_text("#!/bin/sh\necho once >>calls; touch library.so\n")
    real.chmod(0o755)
    environment = {**os.environ, **lean.environment(), "SPECGEN_NINJA": str(real)}

    def build(folder: Path) -> int:
        """Calls of the real one so far."""
        environment["TORCH_EXTENSIONS_DIR"] = str(folder.parent)
        (folder / "build.ninja").write_text(f"build x: {folder}/main.cpp\n{extra}default library.so\n")
        subprocess.run(["ninja", "-v"], env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return len((folder / "calls").read_text().splitlines())

    extra, first, second = "", tmp_path / "build-1" / "library", tmp_path / "build-2" / "library"
    first.mkdir(parents=True)
    (first / "main.cpp").write_text("int f() { return 1; }")
    assert build(first) == 1
    shutil.copytree(first, second)
    if changed == "main.cpp":
        (second / "main.cpp").write_text("int f() { return 2; }")
    elif changed == "build.ninja":
        extra = "flags = -O0\n"
    elif changed == "main.o":  # not moved, but built here
        (second / "main.o").touch()
    elif changed != "nothing":
        (second / {"note": NOTE}.get(changed, changed)).unlink()
    assert build(second) == (1 if changed == "nothing" else 2)


def test_it_stands_before_the_real_one_once_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    first = lean.environment()
    monkeypatch.setenv("PATH", first["PATH"])
    assert lean.environment()["SPECGEN_NINJA"] == first["SPECGEN_NINJA"] != str(lean.PROGRAMS / "ninja")
    version = subprocess.run(["ninja", "--version"], env={**os.environ, **first}, capture_output=True, text=True)
    assert version.stdout.startswith("1."), version
    monkeypatch.setenv(lean.SWITCH, "1")
    assert lean.environment() == {}


INLINE = """
from torch.utils.cpp_extension import load_inline
built = load_inline(name="{name}", cpp_sources=r\"\"\"
{first}
torch::Tensor f(torch::Tensor x, torch::Tensor weight) {{
    TORCH_CHECK(x.is_contiguous());
    auto y = torch::empty_like(x);
    y.copy_({call});
    return y.mul_(weight);
}}
\"\"\", functions=["f"])
"""
FORWARD = "return built.f(x.contiguous(), self.weight)"


def test_a_candidate_in_its_sandbox_is_built_lean(judge) -> None:
    only_lean = "#ifndef AT_PER_OPERATOR_HEADERS\n#error these are all of torch's headers\n#endif"
    top = INLINE.format(name="lean_one", first=only_lean, call="torch::softmax(x, -1)")
    verdict = judge(module(FORWARD, top=top))
    assert verdict.status is Status.CORRECT, verdict


@pytest.mark.slow  # torch's own headers are 20 s of g++
def test_a_candidate_that_needs_more_is_built_with_torch_s_own(judge) -> None:
    softmax = "torch::nn::functional::softmax(x, torch::nn::functional::SoftmaxFuncOptions(-1))"
    verdict = judge(module(FORWARD, top=INLINE.format(name="lean_not", first="", call=softmax)))
    assert verdict.status is Status.CORRECT, verdict


KERNEL = """#include <torch/extension.h>
__global__ void twice(const float* x, float* y, long n) {
    const long at = blockIdx.x * 256l + threadIdx.x;
    if (at < n) y[at] = 2 * x[at];
}
torch::Tensor f(torch::Tensor x) {
    auto y = torch::empty_like(x);
    twice<<<(x.numel() + 255) / 256, 256>>>(x.data_ptr<float>(), y.data_ptr<float>(), x.numel());
    return y;
}
"""


SMALL = "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }"
ERROR = f"#ifdef __CUDA_ARCH__\n#error here\n#endif\n{SMALL}"
SOURCES = {  # source, options, whether it fails, whether nvcc itself need not be asked
    "one architecture": (SMALL, ["-gencode=arch=compute_90,code=sm_90"], False, True),
    "with its PTX": (SMALL, ["-gencode=arch=compute_90,code=[compute_90,sm_90]"], False, True),
    "two architectures": (SMALL, [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)], False, False),
    "an error": (SMALL.replace("2;", "y;"), ["-arch=sm_90"], True, True),
    "an error in the device's reading alone": (ERROR, ["-arch=sm_90"], True, False),
}


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("name", SOURCES)
def test_two_readings_side_by_side_say_and_make_what_nvcc_does(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options, fails, side_by_side = SOURCES[name]
    (tmp_path / "one.cu").write_text(source)
    monkeypatch.setenv("CUDA_HOME", str(Path(find_nvcc() or "").resolve().parent.parent))
    environment = {**os.environ, **lean.environment(), "TMPDIR": str(tmp_path)}
    real = tmp_path / "nvcc"
    real.write_text(f'#!/bin/sh\necho "$1" >>calls\nexec {environment["SPECGEN_REAL_NVCC"]} "$@"\n')
    real.chmod(0o755)
    environment["SPECGEN_REAL_NVCC"] = str(real)
    made = {}
    for program in (environment["PYTORCH_NVCC"], environment["SPECGEN_REAL_NVCC"]):
        command = [program, "-std=c++17", *options, "-c", "one.cu", "-o", "one.o"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        symbols = subprocess.run(["nm", "one.o"], cwd=tmp_path, capture_output=True, text=True).stdout
        kept = sorted(line for line in symbols.splitlines() if "tmpxft" not in line)
        made[program] = (bool(done.returncode), (done.stdout + done.stderr).splitlines(), kept)
        (tmp_path / "one.o").unlink(missing_ok=True)
        assert not list(tmp_path.glob("tmpxft*"))
    first, second = made.values()
    assert first == second
    assert first[0] == fails, first
    assert (tmp_path / "calls").read_text().split() == ["--dryrun", *["-std=c++17"] * (1 if side_by_side else 2)]


MAIN = """#include <torch/extension.h>
torch::Tensor f(torch::Tensor x);
PYBIND11_MODULE(one, m) { m.def("f", torch::wrap_pybind_function(f), "f"); }
"""


@pytest.mark.slow  # more than two minutes of nvcc and g++
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_compilers_are_twice_as_quick_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints seconds (`-s`): nvcc with torch's headers, with the lean ones, with its readings side by side too; g++."""
    (tmp_path / "one.cu").write_text(KERNEL)
    (tmp_path / "main.cpp").write_text(MAIN)
    monkeypatch.setenv("CUDA_HOME", str(Path(find_nvcc() or "").resolve().parent.parent))
    environment = {**os.environ, **lean.environment(), "TMPDIR": str(tmp_path)}
    include = [word for path in extension.include_paths() for word in ("-isystem", path)]
    include += ["-isystem", sysconfig.get_paths()["include"], "-std=c++17"]
    cuda = [*include, "--compiler-options", "-fPIC", "--expt-relaxed-constexpr", "-gencode=arch=compute_90,code=sm_90"]
    nvcc, side_by_side = environment["SPECGEN_REAL_NVCC"], environment["PYTORCH_NVCC"]
    commands = {
        "nvcc": ([nvcc, *cuda, "-c", "one.cu", "-o", "one.o"], ""),
        "nvcc, lean": ([nvcc, *cuda, "-c", "one.cu", "-o", "one.o"], str(lean.HEADERS)),
        "nvcc, lean, side by side": ([side_by_side, *cuda, "-c", "one.cu", "-o", "one.o"], str(lean.HEADERS)),
        "g++": (["g++", *include, "-fPIC", "-c", "main.cpp", "-o", "main.o"], ""),
        "g++, lean": (["g++", *include, "-fPIC", "-c", "main.cpp", "-o", "main.o"], str(lean.HEADERS)),
    }
    seconds: dict[str, float] = {}
    for name, (command, path) in commands.items():
        started = time.monotonic()
        subprocess.run(command, cwd=tmp_path, env={**environment, "CPATH": path}, check=True)
        seconds[name] = time.monotonic() - started
    print("; ".join(f"{name} {taken:.1f} s" for name, taken in seconds.items()))
    assert seconds["nvcc, lean"] < seconds["nvcc"] / 2
    assert seconds["g++, lean"] < seconds["g++"] / 1.5

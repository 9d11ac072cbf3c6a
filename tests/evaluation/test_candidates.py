"""Forms of candidates: told from the text, checked before they run, compiled where that needs no GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specgen_engine.evaluation.base import Status
from specgen_engine.evaluation.candidates.entry import EntryError, parse_entry, value_of
from specgen_engine.evaluation.candidates.forms import detect_form
from specgen_engine.evaluation.candidates.plain_cuda import CompileError, PlainCudaModel, compile_plain_cuda
from specgen_engine.evaluation.digest import error_digest, is_compile_error
from specgen_engine.evaluation.static import static_check
from specgen_engine.evaluation.tasks.load import load_task
from specgen_engine.evaluation.timing import works_on

FORMATS = Path(__file__).parent / "formats"
CUDA = (FORMATS / "candidates" / "scaled_softmax.cu").read_text()
CUTE = (FORMATS / "candidates" / "scaled_softmax_cute.py").read_text()
INLINE = """
from torch.utils.cpp_extension import load_inline
kernel = load_inline("k", cpp_sources="", {}functions=["f"])
class ModelNew: pass
"""
FORMS = {
    "pytorch": "import torch\nclass ModelNew(torch.nn.Module): pass\n",
    "triton": "import triton\nimport triton.language as tl\nclass ModelNew: pass\n",
    "cuda_inline": INLINE.format('cuda_sources="__global__ void k() {}", '),
    "cpp_inline": INLINE.format(""),
    "cute_dsl": CUTE,
    "cuda": CUDA,
    "gpumode/triton": "import triton\ndef custom_kernel(data): return data\n",
    "function/pytorch": "def run(x): return x\n",
    "solution/triton": (FORMATS / "flashinfer/solutions/triton_rows.json").read_text(),
    "solution/pytorch": (FORMATS / "flashinfer/solutions/torch_fused.json").read_text(),
    "other": "class ModelNew(:",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_told_from_the_text(form: str) -> None:
    assert detect_form(FORMS[form]) == form
    fault = static_check(FORMS[form], 1 << 20)
    assert (fault is None) == (form != "other"), fault


ENTRY = "// specgen: entry=f(in0, out0, in0.shape[0]:int, 1e-5:float, stream)\n// specgen: out0=like(in0)\n"
BODY = 'extern "C" int f(const float* x, float* y, int n, float e, cudaStream_t s) { return 0; }\n'
FAULTS = {
    "needs one line": BODY + "__global__ void k() {}",
    "is passed but no line declares": ENTRY.replace("out0, ", "out0, tmp0, ") + BODY,
    "is none of int": ENTRY.replace(":int", ":long") + BODY,
    "is neither inN nor initN": ENTRY.replace("in0.shape[0]", "__import__") + BODY,
    "only numbers": ENTRY.replace("in0.shape[0]", "in0.shape[f(1)]") + BODY,
    "use like(inN)": ENTRY.replace("like(in0)", "same(in0)") + BODY,
    "defines no extern": ENTRY + BODY.replace(" f(", " g("),
    "is not allowed": ENTRY + "// specgen: flags=-lcublas\n" + BODY,
    "is none of entry": ENTRY + "// specgen: result0=like(in0)\n" + BODY,
    "no line '// specgen: out0": ENTRY.split("\n", maxsplit=1)[0].replace("out0, ", "") + "\n" + BODY,
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_declaration_that_is_wrong_is_one_line(words: str) -> None:
    fault = static_check(FAULTS[words], 1 << 20)
    assert fault is not None
    assert fault.status is Status.COMPILE_ERROR
    assert words in fault.reason
    assert "\n" not in fault.reason


def test_an_entry_and_its_values() -> None:
    entry = parse_entry("// specgen: tmp0=int32[in0.shape[0] * 2, 4]\n// specgen: flags=--use_fast_math\n" + ENTRY)
    assert [argument.kind for argument in entry.arguments] == ["pointer", "pointer", "int", "float", "pointer"]
    assert entry.scratch[0].shape == ("in0.shape[0] * 2", "4")
    assert entry.flags == ("--use_fast_math",)
    names = {"in0": torch.zeros(6, 5), "init0": 3}
    assert value_of("in0.shape[1] * 2 - init0 // 2", names) == 9
    assert value_of("in0.numel % 7 + in0.stride[0]", names) == 7
    with pytest.raises(EntryError, match="there is no in1"):
        value_of("in1.numel", names)


def test_an_entry_gets_what_it_declares() -> None:
    """The call as it is made on a GPU, with host memory and a function that looks at its arguments."""
    given: list[int] = []

    def function(*arguments) -> int:
        given[:] = [argument.value for argument in arguments]
        return 0

    text = "// specgen: entry=f(in1, weight.scale, out0, tmp0, in0:float, in1.shape[1] * 2:int64, init0, stream)\n"
    text += "// specgen: out0=in1.dtype[in1.shape[1], 3]\n// specgen: tmp0=like(in1)\n"
    model = PlainCudaModel(parse_entry(text), function, [7])
    scale, x = torch.ones(4), torch.zeros(5, 4, dtype=torch.float16).t()
    model.take_weights({"scale": scale})
    for number in (0.5, 2.5):
        result = model.run([number, x], x.device, 99)
        assert (result.shape, result.dtype) == ((5, 3), torch.float16)
        assert given[:3] == [x.data_ptr(), scale.data_ptr(), result.data_ptr()]
        assert given[4:] == [number, 10, 7, 99]
    with pytest.raises(EntryError, match="in1 is no tensor here"):
        model.run([x], x.device, 0)
    with pytest.raises(RuntimeError, match="f returned CUDA error 700"):
        PlainCudaModel(parse_entry(ENTRY), lambda *_: 700, []).run([x], x.device, 0)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_plain_cuda_compiles_without_a_gpu(tmp_path: Path) -> None:
    library = compile_plain_cuda(CUDA, tmp_path)
    assert library.name == "scaled_softmax-sm_90a.so"
    made = library.stat().st_mtime_ns
    assert compile_plain_cuda(CUDA, tmp_path).stat().st_mtime_ns == made
    with pytest.raises(CompileError) as caught:
        compile_plain_cuda(CUDA.replace("out[at] = ", "out[at] = missing * "), tmp_path / "broken")
    digest = error_digest(f"module.CompileError: {caught.value}").splitlines()
    number = 1 + next(at for at, line in enumerate(CUDA.splitlines()) if "out[at] = " in line)
    assert digest[0] == f'candidate.cu({number}): error: identifier "missing" is undefined'
    assert "missing * " in digest[1]
    assert digest[-1].startswith("hint: ")
    assert not list((tmp_path / "broken").glob("*.so"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_plain_cuda_on_a_cpu_says_what_it_needs(judge) -> None:
    task = load_task(FORMATS / "kernelbench" / "scaled_softmax.py").workloads[0].task
    verdict = judge(CUDA, task)
    assert (verdict.status, verdict.form) == (Status.RUNTIME_ERROR, "cuda")
    assert "--device cuda:N" in verdict.reason
    wrong = judge(CUDA.replace("weight.scale", "weight.bias"), task)
    assert "has no weight 'bias'; it has scale" in wrong.reason


CUTE_COMPILES = """
import os, sys
os.environ["CUTE_DSL_ARCH"] = "sm_90a"
sys.path.insert(0, sys.argv[1])
import torch
from scaled_softmax_cute import ModelNew
ModelNew(64)(torch.randn(2, 64))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it instead")
def test_cute_dsl_compiles_without_a_gpu(tmp_path: Path) -> None:
    """All of the compiler runs; what fails is loading the result, for want of a driver."""
    done = subprocess.run(
        [sys.executable, "-c", CUTE_COMPILES, str(FORMATS / "candidates")], capture_output=True, text=True, timeout=120
    )
    assert "cudaErrorInsufficientDriver" in done.stderr, done.stderr[-2000:]
    assert not is_compile_error(done.stderr)
    assert "no GPU" in error_digest(done.stderr)


CUTE_ERROR = """Traceback (most recent call last):
  File "/scratch/candidate.py", line 22, in forward
cutlass.base_dsl.common.DSLUserCodeError: \n\x1b[91m\x1b[1merror:\x1b[0m NameError in `launch`: name 'z' is not defined
  \x1b[94m-->\x1b[0m /scratch/candidate.py:16
   |
15 |         z = x[t]
16 |     y[t] = z
   |     \x1b[91m^\x1b[0m
  \x1b[94m= note:\x1b[0m Caused exception: name 'z' is not defined
  \x1b[92msuggestion:\x1b[0m Variables used inside staged control flow must be defined before it.
              Give the variable an initial value.
"""
TRITON_ERROR = """Traceback (most recent call last):
  File "/scratch/candidate.py", line 30, in forward
triton.compiler.errors.CompilationError: at 4:4:
def _kernel(x, y, n, B: tl.constexpr):
    at = tl.arange(0, B)
    v = tl.load(x + at, mask=at < n)
    tl.store(y + tl.arange(0, 2*B), v)
    ^
Cannot make_shape_compatible: incompatible dimensions at index 0: 128 and 64
"""


def test_digests_of_just_in_time_compilers() -> None:
    cute = error_digest(CUTE_ERROR).splitlines()
    assert cute[0] == "candidate.py:16: error: NameError in `launch`: name 'z' is not defined"
    assert cute[1] == "16 |     y[t] = z"
    assert cute[2].startswith("hint: Variables used inside staged")
    triton = error_digest(TRITON_ERROR).splitlines()
    assert triton[0].startswith("_kernel, line 4 of the kernel: error: Cannot make_shape_compatible")
    assert triton[1].strip() == "tl.store(y + tl.arange(0, 2*B), v)"
    assert triton[-1].startswith("hint: the shapes don't broadcast")
    assert is_compile_error(CUTE_ERROR)
    assert is_compile_error(TRITON_ERROR)
    assert not is_compile_error("ValueError: triton said CompilationError")


SOLUTION_FAULTS = {
    "spec.language='rust'": {"language": "rust"},
    "use FILE::FUNCTION": {"entry_point": "main.py"},
    "not among the sources": {"entry_point": "other.py::run"},
    "use torch or tvm-ffi": {"language": "cuda", "binding": "ctypes"},
}


@pytest.mark.parametrize("words", SOLUTION_FAULTS)
def test_a_solution_that_is_wrong_is_one_line(words: str) -> None:
    given = json.loads(FORMS["solution/pytorch"])
    given["spec"] |= SOLUTION_FAULTS[words]
    fault = static_check(json.dumps(given), 1 << 20)
    assert fault is not None
    assert words in fault.reason


def test_a_solution_may_not_leave_its_folder_nor_import_what_is_banned() -> None:
    given = json.loads(FORMS["solution/pytorch"])
    given["sources"].append({"path": "../outside.py", "content": "x = 1"})
    assert "leaves its folder" in static_check(json.dumps(given), 1 << 20).reason
    given["sources"][-1] = {"path": "more.py", "content": "import socket"}
    fault = static_check(json.dumps(given), 1 << 20)
    assert (fault.status, fault.reason[:8]) == (Status.REJECTED, "more.py:")


def test_work_on_another_stream_is_told_from_the_wait_itself() -> None:
    told, wait = [30_000] * 9, [8_000, 9_000, 50_000]
    assert works_on([90_000] * 9, wait, told)
    assert not works_on([12_000] * 8 + [900_000], wait, told)
    assert not works_on([], wait, told)
    assert not works_on([300_000] * 9, [290_000] * 9, told)


@pytest.mark.gpu(count=1)
def test_forms_on_a_gpu(tmp_path: Path) -> None:
    from tests.exploits.conftest import GuardedWorker

    module = load_task(FORMATS / "kernelbench" / "scaled_softmax.py").workloads[0].task
    definition = load_task(FORMATS / "flashinfer").workloads[0].task
    worker = GuardedWorker(tmp_path, "cuda:0")
    try:
        for source, task, form in (
            (CUDA, module, "cuda"),
            (CUTE, module, "cute_dsl"),
            (FORMS["solution/triton"], definition, "solution/triton"),
        ):
            verdict = worker.verdict(source, [], task)
            assert (verdict["status"], verdict["form"]) == ("correct", form), verdict
    finally:
        worker.close()

"""Tasks of every format: what the loader makes of them, and that a judge runs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from flashinfer_bench.data import Trace

from specgen_engine.evaluation.base import Status, Task, Verdict
from specgen_engine.evaluation.tasks.base import Format, TaskError
from specgen_engine.evaluation.tasks.flashinfer import append_traces, make_trace
from specgen_engine.evaluation.tasks.load import load_task

from .conftest import TASK

FORMATS = Path(__file__).parent / "formats"
FLASHINFER = FORMATS / "flashinfer"
GPU_MODE = FORMATS / "gpumode" / "row_scale"
MODULE = FORMATS / "kernelbench" / "scaled_softmax.py"
SUBMISSION = "def custom_kernel(data):\n    x, scale, output = data\n    output[...] = {}\n    return output\n"


def solution(name: str) -> str:
    return (FLASHINFER / "solutions" / f"{name}.json").read_text()


# -- loading: no task's code runs ------------------------------------------------------------------------------------


def test_a_module_and_a_trace_folder(tmp_path: Path) -> None:
    loaded = load_task(MODULE)
    assert (loaded.format, loaded.name, len(loaded.workloads)) == (Format.KERNELBENCH, "scaled_softmax", 1)
    assert loaded.workloads[0].task.cases == 3
    (tmp_path / "softmax").mkdir()
    (tmp_path / "softmax" / "task.py").write_text(TASK.source)
    assert load_task(tmp_path / "softmax").name == "softmax"
    assert load_task(tmp_path / "softmax").workloads[0].task.cases == 1


def test_a_gpu_mode_task_checks_its_tests_with_the_first_benchmark() -> None:
    loaded = load_task(GPU_MODE)
    assert loaded.format is Format.GPU_MODE
    assert [workload.task.cases for workload in loaded.workloads] == [3, 1]
    assert [workload.name for workload in loaded.workloads] == ["rows=512, columns=1024", "rows=64, columns=4096"]


def test_a_definition_has_a_task_for_each_workload_and_names_the_files_it_reads() -> None:
    loaded = load_task(FLASHINFER)
    assert loaded.format is Format.FLASHINFER_TRACE
    assert [workload.name for workload in loaded.workloads] == ["rows=64, picked=32", "rows=2048, picked=1024"]
    assert [Path(workload.task.files[0]).name for workload in loaded.workloads] == [
        "gather_0.safetensors",
        "gather_1.safetensors",
    ]


def test_loading_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    module = tmp_path / "module.py"
    module.write_text(f"open({str(mark)!r}, 'w')\n{TASK.source}")
    load_task(module)
    for name in ("task.yml", "task.py", "reference.py"):
        (tmp_path / name).write_text((GPU_MODE / name).read_text().replace("../utils.py", "utils.py"))
    (tmp_path / "utils.py").write_text(f"open({str(mark)!r}, 'w')\n")
    load_task(tmp_path / "task.yml")
    assert not mark.exists()


def _copied(folder: Path, change: dict[str, object]) -> Path:
    definition = json.loads((FLASHINFER / "definitions/rmsnorm/gathered_rmsnorm_h256.json").read_text()) | change
    path = folder / "definitions" / "d.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(definition))
    return path


def test_what_is_wrong_with_a_task_is_one_line(tmp_path: Path) -> None:
    yml = tmp_path / "task.yml"
    cases: dict[str, tuple[str, Path]] = {
        "defines no Model": ("import torch\ndef get_inputs(): ...\n", tmp_path / "a.py"),
        "line 2: ": ("import torch\ndef (", tmp_path / "b.py"),
        "binary bytes": ("\0", tmp_path / "c.py"),
        "no YAML (line 2)": ("files:\n  - {", yml),
        "files: Field required": ("lang: py\n", yml),
        "lang='cu'": ("files: []\nlang: cu\n", yml),
        "several GPUs": ("files: []\ntests: [{world_size: 8, seed: 1}]\n", yml),
        "no reference.py": ("files: []\ntests: [{n: 8, seed: 1}]\n", yml),
        "outside the task's folder": (
            'files: [{name: reference.py, source: "../../etc/x.py"}]\ntests: [{n: 1}]\n',
            yml,
        ),
    }
    for words, (text, path) in cases.items():
        path.write_text(text)
        with pytest.raises(TaskError) as caught:
            load_task(path)
        assert words in str(caught.value), caught.value
        assert "\n" not in str(caught.value)
    with pytest.raises(TaskError, match="no task here"):
        load_task(FORMATS)


def test_what_is_wrong_with_a_definition_is_one_line(tmp_path: Path) -> None:
    for words, change in {
        "needs workloads": {},
        "random results": {"op_type": "sampling"},
        "axes": {"axes": 3},
        "undefined axis": {"axes": {"rows": {"type": "var"}}},
    }.items():
        with pytest.raises(TaskError, match=words) as caught:
            load_task(_copied(tmp_path, change))
        assert "\n" not in str(caught.value)


def test_a_workload_may_not_leave_its_dataset(tmp_path: Path) -> None:
    line = (FLASHINFER / "workloads/rmsnorm/gathered_rmsnorm_h256.jsonl").read_text().splitlines()[0]
    (tmp_path / "workloads").mkdir()
    target = tmp_path / "workloads" / "gathered_rmsnorm_h256.jsonl"
    for path, words in (("../../etc/passwd", "leaves the dataset"), ("blob/none.safetensors", "no such file")):
        target.write_text(line.replace("blob/workloads/gather_0.safetensors", path))
        with pytest.raises(TaskError, match=words):
            load_task(_copied(tmp_path, {}))


# -- judging ---------------------------------------------------------------------------------------------------------


def test_every_shape_is_checked(judge) -> None:
    task = load_task(MODULE).workloads[0].task
    source = """
import torch
class ModelNew(torch.nn.Module):
    def __init__(self, columns):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(columns))
    def forward(self, x):
        y = torch.softmax(x, -1) * self.scale
        return y {wrong}
"""
    assert judge(source.format(wrong=""), task).status is Status.CORRECT
    for rows in (1, 33):
        verdict = judge(source.format(wrong=f"* (1.0 if x.shape[0] != {rows} else 2.0)"), task)
        assert verdict.status is Status.WRONG, (rows, verdict)


def test_a_gpu_mode_task_is_judged_by_its_own_words(judge, pool_thread) -> None:
    task = load_task(GPU_MODE).workloads[0].task
    assert pool_thread.call(pool_thread.pool.check_task(task)) is None
    good = judge(SUBMISSION.format("x * scale[:, None]"), task)
    assert good.status is Status.CORRECT, good
    assert good.form == "gpumode/pytorch"
    wrong = judge(SUBMISSION.format("x * (1 + 1e-3)"), task)
    assert (wrong.status, wrong.reason) == (Status.WRONG, wrong.reason)
    assert "elements differ" in wrong.reason
    only_small = judge(SUBMISSION.format("x * scale[:, None] * (2 if x.shape[0] == 3 else 1)"), task)
    assert only_small.status is Status.WRONG, only_small


def test_a_definition_is_judged_by_workload(judge, pool_thread) -> None:
    task = load_task(FLASHINFER).workloads[0].task
    assert pool_thread.call(pool_thread.pool.check_task(task)) is None
    for name in ("torch_fused", "torch_in_place"):
        verdict = judge(solution(name), task)
        assert verdict.status is Status.CORRECT, verdict
        assert verdict.form == "solution/pytorch"
        assert verdict.max_abs_error is not None
    wrong = judge(solution("torch_no_weight"), task)
    assert (wrong.status, wrong.kind) == (Status.WRONG, "value")
    function = "import torch\ndef run(hidden_states, weight, gather):\n    return hidden_states[gather].double()\n"
    verdict = judge(function, task)
    assert (verdict.status, verdict.kind, verdict.form) == (Status.WRONG, "dtype", "function/pytorch")


def test_a_file_that_a_task_does_not_declare_is_not_there(pool_thread) -> None:
    task = load_task(FLASHINFER).workloads[0].task
    fault = pool_thread.call(pool_thread.pool.check_task(replace(task, source=f"{task.source}# another", files=())))
    assert "not one of the task's files" in fault


# -- traces ----------------------------------------------------------------------------------------------------------

CORRECT = Verdict("x", Status.CORRECT, speedup=2.0, interval=(1.9, 2.1), candidate_ms=0.5, reference_ms=1.0)


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        (replace(CORRECT, max_abs_error=0.25, max_rel_error=0.01), "PASSED"),
        (Verdict("x", Status.WRONG, kind="value", max_abs_error=float("nan")), "INCORRECT_NUMERICAL"),
        (Verdict("x", Status.WRONG, kind="shape"), "INCORRECT_SHAPE"),
        (Verdict("x", Status.WRONG, kind="dtype"), "INCORRECT_DTYPE"),
        (Verdict("x", Status.COMPILE_ERROR, "no"), "COMPILE_ERROR"),
        (Verdict("x", Status.TIMEOUT, "late"), "TIMEOUT"),
        (Verdict("x", Status.REJECTED, "it changes its inputs"), "RUNTIME_ERROR"),
        (Verdict("x", Status.CRASH, "gone"), "RUNTIME_ERROR"),
    ],
)
def test_a_verdict_becomes_a_trace(verdict: Verdict, status: str, tmp_path: Path) -> None:
    loaded = load_task(FLASHINFER)
    trace = make_trace(loaded, loaded.workloads[1], "mine", verdict, "AMD EPYC", {"torch": "2.11.0"})
    path = tmp_path / "traces.jsonl"
    path.write_text((FLASHINFER / "workloads/rmsnorm/gathered_rmsnorm_h256.jsonl").read_text().rstrip())
    append_traces(path, [trace])
    lines = [Trace.model_validate_json(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3
    assert lines[-1].evaluation.status == status
    assert lines[-1].workload.axes == {"rows": 2048, "picked": 1024}
    if verdict.speedup:
        assert lines[-1].evaluation.performance.latency_ms == 0.5
        assert lines[-1].evaluation.correctness.max_absolute_error == 0.25
    else:
        assert verdict.reason in lines[-1].evaluation.log
    assert not list(tmp_path.glob(".traces*"))


def test_other_tasks_have_no_traces() -> None:
    loaded = load_task(MODULE)
    with pytest.raises(ValueError, match="only FlashInfer Trace"):
        make_trace(loaded, loaded.workloads[0], "mine", CORRECT, "cpu", {})


def test_cases_are_read_from_the_text() -> None:
    assert Task("CASES = 7\n").cases == 7
    assert Task("CASES = 9999\n").cases == 64
    assert Task("X = 'CASES = 5'\n").cases == 1

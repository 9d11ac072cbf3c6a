"""GPU MODE tasks: a task.yml that names files, tests (checked) and benchmarks (timed).

The format is that of github.com/gpu-mode/reference-kernels: files [{name, source}], lang, tests and benchmarks (lists
of arguments of generate_input), ranking_by; reference.py defines generate_input, ref_kernel and check_implementation;
a submission defines custom_kernel(data). Seeds in the yml are public, so they are replaced by secret ones.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..base import MAX_CASES, Task
from .base import Format, LoadedTask, TaskError, Workload, parse_module, read_text

SUBMISSION = "@SUBMISSION@"
NOT_NEEDED = ("eval.py", "submission.py")
_MODULE = '''"""GPU MODE task {name}, benchmark {benchmark}."""

import json

from specgen_engine.evaluation.tasks.gpumode_reference import reference_module

CASES = {cases}
globals().update(reference_module(json.loads({text!r})))
'''


class _File(BaseModel):
    name: str
    source: str


class _TaskFile(BaseModel):
    """The part of a task.yml that an evaluation needs."""

    model_config = ConfigDict(extra="ignore")

    files: list[_File]
    lang: str = "py"
    tests: list[dict[str, int | float | bool | str]] = Field(default_factory=list)
    benchmarks: list[dict[str, int | float | bool | str]] = Field(default_factory=list)
    ranking_by: str = "last"
    multi_gpu: bool = False


def load_gpumode(path: Path) -> LoadedTask:
    """One workload a benchmark; the tests are checked with the first. Raises TaskError."""
    task = _read(path)
    if task.lang != "py":
        raise TaskError(f"{path}: lang={task.lang!r}: only tasks in Python (lang: py) can be evaluated")
    if task.multi_gpu or any("world_size" in case for case in (*task.tests, *task.benchmarks)):
        raise TaskError(f"{path}: a task for several GPUs; one GPU evaluates a candidate")
    timed = task.benchmarks or task.tests[:1]
    if not timed:
        raise TaskError(f"{path}: it has neither tests nor benchmarks")
    if 1 + len(task.tests) > MAX_CASES:
        raise TaskError(f"{path}: {len(task.tests)} tests; at most {MAX_CASES - 1} are checked")
    files = {
        file.name: _source(path, file)
        for file in task.files
        if file.source != SUBMISSION and file.name.endswith(".py") and file.name not in NOT_NEEDED
    }
    if "reference.py" not in files:
        raise TaskError(f"{path}: its files have no reference.py")
    name = path.parent.name
    workloads = []
    for index, benchmark in enumerate(timed):
        cases = [benchmark, *(task.tests if index == 0 else [])]
        text = json.dumps({"files": files, "cases": cases})
        module = _MODULE.format(name=name, benchmark=index, cases=len(cases), text=text)
        label = ", ".join(f"{key}={value}" for key, value in benchmark.items() if key != "seed")
        workloads.append(Workload(label, Task(module, name), {"arguments": benchmark, "ranking_by": task.ranking_by}))
    return LoadedTask(name, Format.GPU_MODE, path, tuple(workloads))


def _read(path: Path) -> _TaskFile:
    try:
        value: Any = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise TaskError(f"{path}: no YAML{where}: {getattr(error, 'problem', error)}") from None
    try:
        return _TaskFile.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise TaskError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None


def _source(path: Path, file: _File) -> str:
    """The text of one of its files; sources may lie in the folder above, where GPU MODE keeps what tasks share."""
    pure = PurePosixPath(file.source)
    if pure.is_absolute() or pure.parts.count("..") > 1 or PurePosixPath(file.name).name != file.name:
        raise TaskError(f"{path}: files: {file.source!r} lies outside the task's folder and the one above")
    text = read_text(path.parent / file.source)
    parse_module(text, path.parent / file.source)
    return text

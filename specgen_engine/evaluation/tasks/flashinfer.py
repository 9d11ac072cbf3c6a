"""FlashInfer Trace: a definition and its workloads become tasks; verdicts go back as Traces.

The schema is flashinfer_bench.data's (package flashinfer-bench); its own models validate what is read and written.
A dataset's layout: definitions/TYPE/NAME.json, workloads/TYPE/NAME.jsonl, solutions/..., blob/... (safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...files import write_whole
from ..base import Status, Task, Verdict
from .base import Format, LoadedTask, TaskError, Workload, read_text

if TYPE_CHECKING:
    from flashinfer_bench.data import Evaluation, Trace

NOT_DETERMINISTIC = ("sampling",)
_MODULE = '''"""FlashInfer Trace {name}, workload {uuid}."""

import json

from specgen_engine.evaluation.tasks.flashinfer_reference import reference_module

globals().update(reference_module(json.loads({text!r})))
'''
_STATUS = {
    Status.CORRECT: "PASSED",
    Status.COMPILE_ERROR: "COMPILE_ERROR",
    Status.TIMEOUT: "TIMEOUT",
}
_WRONG = {"shape": "INCORRECT_SHAPE", "structure": "INCORRECT_SHAPE", "dtype": "INCORRECT_DTYPE"}


def load_flashinfer(path: Path) -> LoadedTask:
    """A definition's JSON file, with the workloads of the dataset it lies in. Raises TaskError."""
    from flashinfer_bench.data import Definition

    definition = _validated(Definition, read_text(path), path)
    if definition.op_type in NOT_DETERMINISTIC:
        raise TaskError(
            f"{path}: op_type={definition.op_type!r}: random results can't be compared with the reference's"
        )
    root = _dataset_root(path)
    workloads = _workloads(root, definition.name)
    if not workloads:
        raise TaskError(f"{path}: no workloads/**/{definition.name}.jsonl in {root}; a definition needs workloads")
    given = definition.model_dump(mode="json")
    tasks: list[Workload] = []
    for workload in workloads:
        missing = [name for name in definition.var_axes if name not in workload["axes"]]
        if missing:
            raise TaskError(f"{path}: workload {workload['uuid']}: the axis {missing[0]!r} has no size")
        paths = {spec["path"]: _blob(root, spec["path"]) for spec in workload["inputs"].values() if "path" in spec}
        text = json.dumps({"definition": given, "workload": workload, "files": paths})
        module = _MODULE.format(name=definition.name, uuid=workload["uuid"], text=text)
        axes = ", ".join(f"{name}={size}" for name, size in workload["axes"].items())
        task = Task(module, definition.name, tuple(sorted(paths.values())))
        taken = {known.name for known in tasks}
        label = axes or workload["uuid"]
        tasks.append(Workload(f"{label} ({workload['uuid']})" if label in taken else label, task, workload))
    return LoadedTask(definition.name, Format.FLASHINFER_TRACE, path, tuple(tasks), given)


def check_solution(text: str, definition: str, path: Path) -> str:
    """The name of a Solution for a definition, validated. Raises TaskError."""
    from flashinfer_bench.data import Solution

    solution = _validated(Solution, text, path)
    if solution.definition != definition:
        raise TaskError(f"{path}: a solution of {solution.definition!r}, the task is {definition!r}")
    return str(solution.name)


def make_trace(
    loaded: LoadedTask, workload: Workload, solution: str, verdict: Verdict, hardware: str, libs: dict[str, str]
) -> Trace:
    """A verdict as a Trace. Statuses that the schema lacks (rejected, crash) become RUNTIME_ERROR, told in the log.

    Raises ValueError when the task is no FlashInfer Trace, pydantic's ValidationError when the schema is not met.
    """
    from flashinfer_bench.data import Environment, Trace
    from flashinfer_bench.data import Workload as TraceWorkload

    if loaded.definition is None or workload.origin is None:
        raise ValueError(f"{loaded.name}: only FlashInfer Trace tasks have traces")
    return Trace(
        definition=loaded.definition["name"],
        workload=TraceWorkload.model_validate(workload.origin),
        solution=solution,
        evaluation=_evaluation(verdict, Environment(hardware=hardware, libs=libs)),
    )


def _evaluation(verdict: Verdict, environment: Any) -> Evaluation:
    from flashinfer_bench.data import Correctness, Evaluation, EvaluationStatus, Performance

    status = EvaluationStatus(_trace_status(verdict))
    passed = status is EvaluationStatus.PASSED
    correctness = performance = None
    if passed or status is EvaluationStatus.INCORRECT_NUMERICAL:
        correctness = Correctness(
            max_relative_error=_figure(verdict.max_rel_error), max_absolute_error=_figure(verdict.max_abs_error)
        )
    if passed:
        performance = Performance(
            latency_ms=verdict.candidate_ms or 0.0,
            reference_latency_ms=verdict.reference_ms or 0.0,
            speedup_factor=verdict.speedup or 0.0,
        )
    log = "" if passed else f"{verdict.status}: {verdict.reason}\n{verdict.digest}".strip()
    return Evaluation(
        status=status,
        environment=environment,
        timestamp=datetime.now(UTC).isoformat(),
        log=log,
        correctness=correctness,
        performance=performance,
    )


def _trace_status(verdict: Verdict) -> str:
    if verdict.status is Status.WRONG:
        return _WRONG.get(verdict.kind, "INCORRECT_NUMERICAL")
    return _STATUS.get(verdict.status, "RUNTIME_ERROR")


def _figure(value: float | None) -> float:
    """Zero where nothing floating-point was compared; NaN stays (the schema has it)."""
    return 0.0 if value is None else value if math.isnan(value) else abs(value)


def append_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Add lines to a .jsonl, whole or not at all."""
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    lines = "".join(trace.model_dump_json(indent=None) + "\n" for trace in traces)
    write_whole(path, before + lines)


def _validated(model: Any, text: str, path: Path) -> Any:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise TaskError(f"{path}: {where}: {first['msg']}") from None


def _dataset_root(path: Path) -> Path:
    """The folder above definitions/, else the definition's own."""
    for folder in path.absolute().parents:
        if folder.name == "definitions":
            return folder.parent
    return path.absolute().parent


def _workloads(root: Path, name: str) -> list[dict[str, Any]]:
    from flashinfer_bench.data import Trace

    found: list[dict[str, Any]] = []
    for path in sorted((root / "workloads").rglob(f"{name}.jsonl")):
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                trace = _validated(Trace, line, Path(f"{path}:{number}"))
                if trace.definition != name:
                    raise TaskError(f"{path}:{number}: a workload of {trace.definition!r}")
                found.append(trace.workload.model_dump(mode="json"))
    return found


def _blob(root: Path, relative: str) -> str:
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise TaskError(f"{root}: the path {relative!r} leaves the dataset")
    if not path.is_file():
        raise TaskError(f"{path}: no such file, but a workload reads it")
    return str(path)

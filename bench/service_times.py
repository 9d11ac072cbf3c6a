"""Seconds that judging an answer takes on an idle machine, from reports of this project's own harness.

scores.json's times were taken with 10 to 15 compilations beside them; these replace them in studies. An answer's own
measurement is used where there is one, else the median of its kind in its task, else of its kind.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["cuda", "triton", "torch"]


class Service(NamedTuple):
    """Seconds on the CPU (import with compiling), then on the GPU (check and timing)."""

    compile_s: float
    gpu_s: float


def kind_of(source: str) -> Kind:
    """By what the module imports."""
    return "cuda" if "load_inline" in source else "triton" if "import triton" in source else "torch"


def task_of(answer: str) -> str:
    """'glm51/topk/iter-1/fork-2.md' -> 'glm51/topk'."""
    return answer.partition("/iter-")[0]


@dataclass(slots=True)
class ServiceTimes:
    """Measured rows by answer, and what to assume of the others. Empty: nothing is known, of() gives None."""

    rows: dict[str, tuple[Kind, Service]] = field(default_factory=dict)
    builds_s: list[float] = field(default_factory=list)

    def of(self, answer: str, kind: Kind) -> Service | None:
        """Seconds of one answer; None when no answer of its kind was measured."""
        near = [row for name, row in self.rows.items() if row[0] == kind and task_of(name) == task_of(answer)]
        rows = [self.rows[answer]] if answer in self.rows else near or [r for r in self.rows.values() if r[0] == kind]
        if not rows:
            return None
        compile_s = statistics.median(service.compile_s for _, service in rows)
        if kind == "cuda" and self.builds_s:
            compile_s = statistics.median(self.builds_s)
        return Service(compile_s, statistics.median(service.gpu_s for _, service in rows))

    def measured(self, answer: str) -> bool:
        return answer in self.rows


def read_service_times(paths: Iterable[str], kinds: dict[str, Kind]) -> ServiceTimes:
    """From specgen.verdicts/1 and specgen.scores/1 reports. kinds: of the answers that are studied.

    Where a report, or a run in it, lists compile_s, its CUDA answers were linked from earlier builds: those seconds
    stand for all of them. built_alone_s, one build with nothing beside it, stands before any other. Where runs of a
    report are marked "idle", rows of its others don't count: many workers, or servers beside them, were waited for.

    Raises ValueError naming the file.
    """
    times, listed, alone = ServiceTimes(), [], []
    for path in paths:
        try:
            report = json.loads(Path(path).read_text())
            runs = report.get("runs", [report])
            for run in runs:
                listed += run.get("compile_s", [])
            idle = [number for number, run in enumerate(runs) if run.get("idle")]
            rows = report.get("verdicts") or [{"candidate": name, **row} for name, row in report["answers"].items()]
            for row in rows:
                if idle and row.get("run", 0) not in idle:
                    continue
                alone += [row["built_alone_s"]] if "built_alone_s" in row else []
                name = row["candidate"]
                if name in kinds and row["status"] != "cancelled":
                    times.rows[name] = kinds[name], _service(row)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--service-times {path}: not usable ({error}); give a report of bench.evaluation or bench.scores"
            ) from None
    times.builds_s = alone or listed
    return times


def _service(row: dict[str, Any]) -> Service:
    stages = row.get("stages") or {"compile": row["import_s"], "check": row["check_s"], "time": row.get("time_s", 0.0)}
    return Service(stages.get("compile", 0.0), stages.get("check", 0.0) + stages.get("time", 0.0))

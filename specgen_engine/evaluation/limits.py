"""What an evaluation may take, and how it is done: the knobs that an operator may turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

SANDBOXES = ("off", "prefer", "require")


@dataclass(frozen=True, slots=True)
class EvaluationLimits:
    """Limits of one evaluation; seconds are wall time, bytes are of the candidate's whole process tree.

    task_s: import of the reference, its construction and one set of inputs with expected outputs.
    compile_s: import of the candidate (load_inline compiles there) and construction of ModelNew.
    check_s: one call of ModelNew on one seed, with the first call's just-in-time compilation.
    profile_s: the whole profile stage, where one is asked for; its end costs the profile, never the verdict.
    peak_memory_gbs: the device's memory bandwidth in GB/s for the roofline floor; None: what data sheet and device say.
    time_s: the whole timing stage.  timing_budget_s: how long timing repeats when its interval stays wide.
    precision: half width of the 95 % interval, as a share of the speed-up, at which timing stops early.
    output_bytes: what a candidate may print.  source_bytes: how long its text may be.
    check_seeds: seeds checked before timing; two more are checked in timed calls and one, hidden, after them.
    threads: torch and OpenMP threads of reference and candidate on a CPU.
    processes: processes a candidate may have at once (compilers among them).
    remember_hangs: a candidate whose call did not end is not run again for a day; it gets the same verdict at once.
    parallel_checks: on a GPU with room for it, candidates are compiled just in time and checked side by side;
        each is timed alone either way.
    spares: a process waits ready for the next candidate, on a GPU with its CUDA context (some 0.5 GB of it).
    judges: references that a worker keeps ready, those of its latest tasks; each is a process with the task's model,
        on a GPU (some 0.5 GB of it and the weights) more than one only while there is much room.
    lock_clocks: hold the GPU's SM clock at its highest while the pool lives (needs the right to; else it is said).
    sandbox: off, prefer (the best level this machine offers) or require (refuse to start without kernel isolation).

    Raises ValueError naming field and value when one is out of range.
    """

    task_s: float = 60.0
    compile_s: float = 180.0
    check_s: float = 30.0
    time_s: float = 30.0
    timing_budget_s: float = 0.6
    precision: float = 0.03
    memory_bytes: int = 8 << 30
    output_bytes: int = 1 << 20
    source_bytes: int = 1 << 20
    check_seeds: int = 2
    threads: int = 1
    processes: int = 64
    remember_hangs: bool = True
    parallel_checks: bool = True
    spares: bool = True
    judges: int = 3
    lock_clocks: bool = False
    sandbox: str = "prefer"
    profile_s: float = 120.0
    peak_memory_gbs: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "sandbox":
                if value not in SANDBOXES:
                    raise ValueError(f"sandbox={value!r}: use one of {', '.join(SANDBOXES)}")
            elif field.name == "peak_memory_gbs" and value is None:
                continue
            elif isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}={value!r}: use true or false")
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{field.name}={value!r}: use a number above 0")

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

"""The contract of profiling: a correct candidate goes in, one Profile comes out, whatever went wrong on the way.

No torch here: the contract of evaluation imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple


class Tool(StrEnum):
    """What measured. NONE: nothing did; Profile.reason says why."""

    NCU = "ncu"
    NSYS = "nsys"
    CUPTI = "cupti"
    TORCH = "torch.profiler"
    NONE = "none"


class Bound(StrEnum):
    """What a candidate's time is spent on; LATENCY: neither memory nor arithmetic is busy most of the time."""

    MEMORY = "memory"
    COMPUTE = "compute"
    LATENCY = "latency"
    UNKNOWN = "unknown"


AUTO = "auto"
"""The best tool that works here, in the order of CHAIN."""
CHAIN = {"cuda": (Tool.NCU, Tool.CUPTI, Tool.TORCH), "cpu": (Tool.TORCH,)}
CHOICES = (AUTO, *(str(tool) for tool in Tool if tool is not Tool.NONE))


class Metric(NamedTuple):
    """One figure under the tool's own name for it."""

    name: str
    value: float
    unit: str


class Kernel(NamedTuple):
    """All launches of one kernel (or operator, on a CPU) within one call of the candidate.

    time_ns: of all launches together. grid, block: of the longest launch. registers: a thread; shared_bytes: a block,
    static and dynamic. occupancy: resident warps over what the device can hold, 0 to 1; where it comes from (achieved
    or theoretical) the metrics say. None: the tool does not tell.
    """

    name: str
    launches: int
    time_ns: float
    grid: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None
    registers: int | None = None
    shared_bytes: int | None = None
    occupancy: float | None = None


class Roofline(NamedTuple):
    """Achieved shares of the device's peaks, 0 to 1; None where nothing was counted or no peak is known.

    counted: where bytes and flops come from ("ncu": hardware counters; "task": the reference's inputs, outputs and
    operations, so a lower bound of what the candidate moved). flop_type: the arithmetic whose peak was taken.
    peaks: where the peaks come from.
    """

    memory: float | None
    compute: float | None
    bytes: float | None
    flops: float | None
    flop_type: str
    counted: str
    peaks: str


class Limit(NamedTuple):
    """One thing that holds the candidate back. share: of its time that is at stake, 0 to 1, as estimated from the
    metrics named in evidence; advice: what is usually done about it."""

    title: str
    share: float
    evidence: str
    advice: str


@dataclass(frozen=True, slots=True)
class Profile:
    """tool: which one ran.  reason: why it is not the best one, one line; "" when it is.

    sandbox: the level in force around the profiled process.  call_ns: one call, by the tool's own clock, counters on
    (never a figure to report: Verdict.candidate_ms is).  kernels: longest first.  limits: at most three.
    sections: what was collected for the bound that the first, light pass found.
    """

    tool: Tool
    reason: str = ""
    device: str = ""
    sandbox: str = ""
    bound: Bound = Bound.UNKNOWN
    call_ns: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    metrics: tuple[Metric, ...] = ()
    roofline: Roofline | None = None
    limits: tuple[Limit, ...] = ()
    sections: tuple[str, ...] = ()

    def value(self, name: str) -> float | None:
        return next((metric.value for metric in self.metrics if metric.name == name), None)

    def with_reason(self, reason: str) -> Profile:
        return replace(self, reason="; ".join(filter(None, (reason, self.reason))))

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["kernels"] = [kernel._asdict() for kernel in self.kernels]
        plain["metrics"] = {metric.name: {"value": metric.value, "unit": metric.unit} for metric in self.metrics}
        plain["roofline"] = self.roofline._asdict() if self.roofline else None
        plain["limits"] = [limit._asdict() for limit in self.limits]
        return plain | {"tool": str(self.tool), "bound": str(self.bound), "sections": list(self.sections)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Profile:
        """Raises KeyError, TypeError or ValueError on something that to_dict did not make."""
        rest = dict(plain)
        roofline = rest.pop("roofline")
        kernels = [
            Kernel(**kernel)._replace(grid=_triple(kernel["grid"]), block=_triple(kernel["block"]))
            for kernel in rest.pop("kernels")
        ]
        return cls(
            tool=Tool(rest.pop("tool")),
            bound=Bound(rest.pop("bound")),
            kernels=tuple(kernels),
            metrics=tuple(Metric(name, **figure) for name, figure in rest.pop("metrics").items()),
            roofline=Roofline(**roofline) if roofline else None,
            limits=tuple(Limit(**limit) for limit in rest.pop("limits")),
            sections=tuple(rest.pop("sections")),
            **rest,
        )


def no_profile(reason: str, device: str = "") -> Profile:
    return Profile(Tool.NONE, reason=reason, device=device)


def _triple(values: Any) -> tuple[int, int, int] | None:
    return (values[0], values[1], values[2]) if values else None


class ProfileError(Exception):
    """A tool gave no figures; the message is one line that says why and what would help."""


class CandidateFault(ProfileError):
    """The candidate itself failed while it was profiled; another tool would not do better."""

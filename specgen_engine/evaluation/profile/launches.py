"""From single launches, as tracing tools report them, to the kernels of one call. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .base import Kernel, Metric, ProfileError, Tool

MAX_KERNELS = 24
NAME_CHARS = 120
Dim = tuple[int, int, int]


class Launch(NamedTuple):
    """One kernel on the device; times in ns on one clock. occupancy: theoretical, 0 to 1."""

    name: str
    start: float
    end: float
    grid: Dim | None = None
    block: Dim | None = None
    registers: int | None = None
    shared_bytes: int | None = None
    occupancy: float | None = None

    @property
    def time_ns(self) -> float:
        return self.end - self.start


class Call(NamedTuple):
    """One call of the candidate. span_ns: from its first launch to its last one's end; busy_ns: some kernel ran."""

    span_ns: float
    busy_ns: float
    kernels: tuple[Kernel, ...]


def call_of(launches: Iterable[Launch]) -> Call:
    """Raises ProfileError when nothing was launched."""
    ordered = sorted(launches, key=lambda launch: launch.start)
    if not ordered:
        raise ProfileError("the tool saw no kernel in the call")
    busy, end = 0.0, ordered[0].start
    for launch in ordered:  # launches on several streams overlap
        busy += max(0.0, launch.end - max(end, launch.start))
        end = max(end, launch.end)
    groups: dict[str, list[Launch]] = {}
    for launch in ordered:
        groups.setdefault(launch.name[:NAME_CHARS], []).append(launch)
    return Call(end - ordered[0].start, busy, kernels_of(groups))


def kernels_of(groups: Mapping[str, Sequence[Launch]]) -> tuple[Kernel, ...]:
    kernels = []
    for name, launches in groups.items():
        longest = max(launches, key=lambda launch: launch.time_ns)
        total = sum(launch.time_ns for launch in launches)
        shape = (longest.grid, longest.block, longest.registers, longest.shared_bytes, longest.occupancy)
        kernels.append(Kernel(name, len(launches), total, *shape))
    return tuple(sorted(kernels, key=lambda kernel: -kernel.time_ns)[:MAX_KERNELS])


def median_call(calls: Sequence[Call]) -> Call:
    return sorted(calls, key=lambda call: call.busy_ns)[len(calls) // 2]


def plain_call(tool: Tool, call: Call, extra: Sequence[Metric] = ()) -> dict[str, Any]:
    """As a message; parse_call is its reader."""
    kernels = [kernel._asdict() for kernel in call.kernels]
    return {
        "event": "profiled",
        "tool": str(tool),
        "span_ns": call.span_ns,
        "busy_ns": call.busy_ns,
        "kernels": kernels,
        "metrics": [list(metric) for metric in extra],
    }


def parse_call(message: Mapping[str, Any]) -> tuple[Call, tuple[Metric, ...]]:
    """What a process that runs foreign code says of itself. Raises ProfileError unless it has the expected form."""
    try:
        kernels = []
        for said in message["kernels"][:MAX_KERNELS]:
            numbers = [_number(said[key]) for key in ("registers", "shared_bytes", "occupancy")]
            registers, shared = (None if value is None else int(value) for value in numbers[:2])
            shape = (_dim(said["grid"]), _dim(said["block"]), registers, shared, numbers[2])
            time_ns = _number(said["time_ns"]) or 0.0
            kernels.append(Kernel(_name(said["name"]), int(_number(said["launches"]) or 0), time_ns, *shape))
        metrics = tuple(
            Metric(_name(name), _number(value) or 0.0, _name(unit)) for name, value, unit in message["metrics"][:64]
        )
        return Call(_number(message["span_ns"]) or 0.0, _number(message["busy_ns"]) or 0.0, tuple(kernels)), metrics
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ProfileError(f"the candidate's process sent no profile ({type(error).__name__})") from error


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is text")
    return "".join(letter for letter in value[:NAME_CHARS] if letter.isprintable())


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e18:
        raise ValueError("a figure is a number from 0 on")
    return value


def _dim(value: Any) -> Dim | None:
    if value is None:
        return None
    x, y, z = (int(_number(part) or 0) for part in value)
    return x, y, z

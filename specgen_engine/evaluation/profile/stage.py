"""The profile stage, in the supervisor: which tool, in which process, and what its figures come to.

A verdict never changes here: whatever goes wrong, it stays as it is and the profile says why there is none.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..children import Child
from ..worker import Ended, Worker
from . import ncu, nsys, summary
from .base import AUTO, CHAIN, CHOICES, Bound, CandidateFault, Metric, Profile, ProfileError, Tool, no_profile
from .launches import Call, parse_call
from .outside import Outside
from .roofline import DeviceFacts, Peaks, Work, achieved, classify, peaks_of

LEAST_S = 1.0


@dataclass(frozen=True)
class Subjected:
    """The candidate as it stands after timing: its process and the judge's, one set of inputs, its figures."""

    child: Child
    judge: Child
    source: str
    build: Path
    slot: int
    layout: Any
    candidate_ms: float


def profile_candidate(worker: Worker, subject: Subjected, wanted: str) -> dict[str, Any]:
    """Profile.to_dict() with the lines for a prompt under "text". wanted: one of CHOICES."""
    profile = Profiling(worker, subject).run(wanted)
    return profile.to_dict() | {"text": summary.profile_text(profile)}


class Profiling:
    """One profile; run() tries the tools in turn."""

    def __init__(self, worker: Worker, subject: Subjected) -> None:
        self.worker, self.subject = worker, subject
        self.deadline = time.monotonic() + worker.limits.profile_s
        self.device_name = worker.device

    def run(self, wanted: str) -> Profile:
        """Never raises but PoolGone."""
        reasons: list[str] = []
        try:
            self._learn_the_work()
            for tool in self._tools(wanted):
                try:
                    profile = self._by(tool)
                    return replace(profile, device=self.device_name).with_reason("; ".join(reasons))
                except CandidateFault:
                    raise
                except ProfileError as error:
                    reasons.append(str(error))
        except Ended as ended:
            reasons.append(ended.reason)
        except ProfileError as error:
            reasons.append(str(error))
        return no_profile("; ".join(reasons), self.device_name)

    def _tools(self, wanted: str) -> tuple[Tool, ...]:
        kind = "cuda" if self.worker.on_gpu else "cpu"
        if wanted not in CHOICES:
            raise ProfileError(f"profile={wanted!r}: use one of {', '.join(CHOICES)}")
        if wanted == AUTO:
            return CHAIN[kind]
        first = Tool(wanted)
        after = CHAIN[kind][CHAIN[kind].index(first) + 1 :] if first in CHAIN[kind] else CHAIN[kind]
        return (first, *(tool for tool in after if tool is not Tool.NCU))

    def _learn_the_work(self) -> None:
        message = {"op": "work", "slot": self.subject.slot, "needed": False, "flops": True}
        self.worker.ask(self.subject.judge, message)
        told = self.worker.reply(self.subject.judge, self._left(), "counting the task's work")
        self.work, facts = Work(**told["work"]), DeviceFacts(**told["facts"])
        self.peaks: Peaks = peaks_of(facts, self.worker.limits.peak_memory_gbs)
        self.device_name = facts.name if self.worker.on_gpu else self.worker.device

    def _by(self, tool: Tool) -> Profile:
        if tool is Tool.NCU:
            return self._by_ncu()
        if tool is Tool.NSYS:
            return self._by_nsys()
        return self._inside(tool)

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left < LEAST_S:
            raise ProfileError(f"profiling took more than {self.worker.limits.profile_s:g} s")
        return left

    # -- in the candidate's process --------------------------------------------------------------------------------

    def _inside(self, tool: Tool) -> Profile:
        worker, subject = self.worker, self.subject
        worker.ask(subject.child, {"op": "profile", "tool": str(tool), "inputs": subject.layout})
        try:
            told = worker.reply(subject.child, self._left(), f"being profiled by {tool}")
        except Ended as ended:
            raise CandidateFault(f"{tool}: {ended.reason}") from ended
        if "error" in told:
            raise ProfileError(str(told["error"])[:300])
        call, extra = parse_call(told)
        profile = self._from_launches(Profile(tool, sandbox=worker.level), call, extra)
        return profile

    def _from_launches(self, start: Profile, call: Call, extra: tuple[Metric, ...]) -> Profile:
        """Shares of the peaks over the time that was measured without a tool, so that gaps count."""
        timed_ns = self.subject.candidate_ms * 1e6
        work, cpu = self.work, not self.worker.on_gpu
        flops = {work.flop_type: float(work.flops)} if work.flops else {}
        least = float(work.input_bytes + work.output_bytes)
        roofline = achieved(timed_ns / 1e9, least, flops, self.peaks, "task")
        bound = classify(roofline.memory, roofline.compute)
        if not cpu and call.busy_ns < 0.6 * timed_ns:
            bound = Bound.LATENCY
        metrics = (*extra, Metric("kernel_time", call.busy_ns, "ns"), Metric("call_span", call.span_ns, "ns"))
        profile = replace(
            start, bound=bound, call_ns=call.span_ns, kernels=call.kernels, metrics=metrics, roofline=roofline
        )
        found = summary.limits_on_cpu(profile, call) if cpu else summary.limits_from_launches(profile, call, timed_ns)
        return replace(profile, limits=summary.limits_of(found))

    # -- under a tool of its own -----------------------------------------------------------------------------------

    def _by_ncu(self) -> Profile:
        program = ncu.find_ncu()
        with Outside(self.worker, self.subject, self._left, Tool.NCU, program) as outside:
            listed = outside.run(lambda _: ncu.query_command(program), bool, remember=False)
            tensor = ncu.tensor_metrics(listed)
            readings = self._readings(outside, program, ncu.light_request(tensor))
            light = ncu.light_of(readings)
            bound = classify(light.memory, light.sm)
            request = ncu.deep_request(bound, light.longest)
            deep, reason = [], ""
            try:
                deep = self._readings(outside, program, request)
            except ProfileError as error:
                reason = f"no second pass ({error})"
            top = ncu.longest_reading(readings, light.longest)
            figures = top.figures | (deep[0].figures if deep else {})
            level = outside.level
        roofline = achieved(light.call_ns / 1e9, light.bytes, light.flops, self.peaks, "ncu")
        profile = Profile(
            Tool.NCU, reason=reason, sandbox=level, bound=bound, call_ns=light.call_ns, kernels=light.kernels,
            metrics=tuple(figures.values()), roofline=roofline, sections=(*ncu.LIGHT, *request.sections),
        )  # fmt: skip
        found = summary.limits_from_counters(profile, figures, self.peaks, self.work)
        return replace(profile, limits=summary.limits_of(found))

    def _readings(self, outside: Outside, program: str, request: ncu.Request) -> list[ncu.Reading]:
        """Once more without the metrics that this ncu doesn't know on this device."""
        for _ in range(2):
            good = functools.partial(ncu.says_why, asked=request)
            log = outside.run(self._ncu_line(program, request, outside), good)
            try:
                return ncu.parse(log)
            except ProfileError as error:
                unknown = ncu.unknown_metrics(log, request.metrics)
                if not unknown:
                    raise ProfileError(f"{error}{outside.complaint()}") from error
                request = request._replace(metrics=tuple(name for name in request.metrics if name not in unknown))
        raise ProfileError("ncu: it knows too few of the metrics asked for")

    @staticmethod
    def _ncu_line(program: str, request: ncu.Request, outside: Outside) -> Callable[[Path], list[str]]:
        return lambda log: ncu.command(program, request, log, outside.driver)

    def _by_nsys(self) -> Profile:
        program = nsys.find_nsys()
        with Outside(self.worker, self.subject, self._left, Tool.NSYS, program) as outside:
            export = outside.folder / "report.sqlite"
            outside.run(
                lambda _: nsys.command(program, export.with_suffix(""), outside.driver), lambda _: export.exists()
            )
            trace = nsys.parse(export)
            level = outside.level
        extra = (Metric("launch_api_time", trace.launch_api_ns, "ns"),)
        return self._from_launches(Profile(Tool.NSYS, sandbox=level), trace.call, extra)

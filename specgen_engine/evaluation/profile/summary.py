"""From figures to the limits that matter, and to the lines for a prompt. Pure functions.

The thresholds are rules of thumb of the CUDA C++ Best Practices Guide and of Nsight Compute's own rules; a limit's
share says how much of the time is at stake if its figure were perfect, an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from . import ncu
from .base import Bound, Kernel, Limit, Metric, Profile, Tool
from .launches import Call
from .roofline import Peaks, Work

LINES = 15
"""Head, note, roofline, kernels, two a limit, metrics: what profile_text can write at most."""
LINE_CHARS = 150
TOP_LIMITS, TOP_KERNELS = 3, 5
LEAST_SHARE = 0.05
IDEAL_SECTORS = 4.0
"""32-byte sectors a request of a warp reading 4-byte words side by side; 16 for 16-byte loads."""
WIDEST_SECTORS = 16.0
STALL_ADVICE = {
    "long_scoreboard": "global memory is waited for: more loads in flight (unroll, vector loads, async copies)",
    "short_scoreboard": "shared memory or special functions are waited for: fewer exchanges, other layout",
    "barrier": "warps wait at barriers: smaller blocks, fewer __syncthreads, warp-level exchange",
    "mio_throttle": "the shared-memory queue is full: wider accesses, fewer shuffles",
    "lg_throttle": "the load/store queue is full: wider (16-byte) global accesses",
    "math_pipe_throttle": "the arithmetic pipe is full: fewer or cheaper operations, tensor cores",
    "wait": "fixed latencies: more independent instructions a thread (unroll)",
    "not_selected": "enough warps are ready: the issue slots are the limit",
    "no_instruction": "instructions are fetched too slowly: smaller loop bodies, less unrolling",
    "gmma": "tensor core results are waited for: more products in flight",
}


def limits_of(candidates: Iterator[Limit] | list[Limit]) -> tuple[Limit, ...]:
    """The three with the most time at stake, of those worth a word."""
    known = [limit for limit in candidates if limit.share >= LEAST_SHARE]
    return tuple(sorted(known, key=lambda limit: -limit.share)[:TOP_LIMITS])


def limits_from_counters(profile: Profile, figures: Mapping[str, Metric], peaks: Peaks, work: Work) -> list[Limit]:
    """figures: of the longest kernel, both passes merged; the whole call is in profile."""
    found = [*_busy(profile), *_traffic(profile, work), *_access(figures), *_issue(figures), *_launch(profile, figures)]
    found += _arithmetic(profile, figures, peaks)
    return found


def limits_from_launches(profile: Profile, call: Call, candidate_ns: float) -> list[Limit]:
    """Without counters: times, shapes and the task's own bytes are all there is. candidate_ns: as it was timed."""
    found = [*_busy(profile), *_gaps(call, candidate_ns)]
    if profile.kernels:
        found += _occupancy(profile.kernels[0], profile.kernels[0].time_ns / max(1.0, call.busy_ns))
    return found


def limits_on_cpu(profile: Profile, call: Call) -> list[Limit]:
    """Operators by their own time; what is left is Python, dispatch and code that torch does not see."""
    whole = max(1.0, call.span_ns)
    found = [*_busy(profile)]
    for kernel in call.kernels[:TOP_LIMITS]:
        evidence = f"{kernel.time_ns / 1e3:.1f} us of {whole / 1e3:.1f} us, {kernel.launches} calls"
        advice = "fuse it with its neighbours, avoid its temporaries, or write it as one vectorized loop"
        found.append(Limit(f"operator {kernel.name[:60]}", min(1.0, kernel.time_ns / whole), evidence, advice))
    outside = max(0.0, 1 - call.busy_ns / whole)
    evidence = f"{(whole - call.busy_ns) / 1e3:.1f} us of {whole / 1e3:.1f} us"
    found.append(
        Limit("time outside torch operators", outside, evidence, "compiled code of its own, or Python overhead")
    )
    return found


def _busy(profile: Profile) -> Iterator[Limit]:
    roofline = profile.roofline
    if roofline is None:
        return
    for name, share, advice in (
        ("memory bandwidth", roofline.memory, "move fewer bytes: fuse, keep values in registers, narrower types"),
        ("arithmetic throughput", roofline.compute, "fewer operations, or types with a higher peak (tensor cores)"),
    ):
        if share is not None and share >= 0.6:
            source = "counted" if roofline.counted == Tool.NCU else "of the task's least traffic"
            yield Limit(f"near the peak of {name}", min(share, 1.0), f"{share:.0%} of peak ({source})", advice)


def _traffic(profile: Profile, work: Work) -> Iterator[Limit]:
    roofline, least = profile.roofline, work.input_bytes + work.output_bytes
    if roofline is None or not roofline.bytes or not least or not roofline.memory:
        return
    ratio = roofline.bytes / least
    if ratio > 1.2:
        evidence = f"{_bytes(roofline.bytes)} moved, {_bytes(least)} needed ({ratio:.1f}x)"
        yield Limit(
            "more memory traffic than the task needs", (1 - 1 / ratio) * min(1.0, roofline.memory), evidence,
            "read inputs once: fuse kernels, tile so that data is reused from shared memory or L2",
        )  # fmt: skip


def _access(figures: Mapping[str, Metric]) -> Iterator[Limit]:
    for what, sectors, requests in (
        ("loads", ncu.LOADS, ncu.LOAD_REQUESTS), ("stores", ncu.STORES, ncu.STORE_REQUESTS)
    ):  # fmt: skip
        count, asked = _value(figures, sectors), _value(figures, requests)
        if count and asked and count / asked > WIDEST_SECTORS:
            each = count / asked
            yield Limit(
                f"uncoalesced global {what}", 1 - WIDEST_SECTORS / each, f"{each:.1f} sectors of 32 B a request",
                "let neighbouring threads touch neighbouring addresses, or stage through shared memory",
            )  # fmt: skip
    spills = (_value(figures, ncu.SPILL_LOADS) or 0) + (_value(figures, ncu.SPILL_STORES) or 0)
    asked = (_value(figures, ncu.LOAD_REQUESTS) or 0) + (_value(figures, ncu.STORE_REQUESTS) or 0)
    if spills and asked:
        yield Limit(
            "registers spilled to local memory", spills / (spills + asked),
            f"{spills:.0f} local against {asked:.0f} global accesses",
            "smaller tiles a thread, fewer values alive at once, a higher register limit",
        )  # fmt: skip
    conflicts, waves = _value(figures, ncu.CONFLICTS), _value(figures, ncu.WAVEFRONTS)
    if conflicts and waves:
        busy = _value(figures, "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed")
        share = conflicts / waves * (busy / 100 if busy else 0.5)
        yield Limit(
            "shared-memory bank conflicts", share, f"{conflicts / waves:.0%} of shared-memory wavefronts are conflicts",
            "pad or swizzle the shared-memory layout",
        )  # fmt: skip


def _issue(figures: Mapping[str, Metric]) -> Iterator[Limit]:
    waits = ncu.stalls(figures)
    total = sum(value for _, value in waits)
    for reason, value in waits[:2]:
        if reason != "selected" and total and value / total > 0.2:
            evidence = f"{value:.1f} of {total:.1f} warps an issued instruction wait for it"
            advice = STALL_ADVICE.get(reason, "see this stall reason in the Nsight Compute guide")
            yield Limit(f"warps stall on {reason}", value / total * _idle_issue(figures), evidence, advice)


def _idle_issue(figures: Mapping[str, Metric]) -> float:
    """The share of cycles in which no instruction was issued: what stalls can cost at most."""
    busy = _value(figures, "smsp__issue_active.avg.pct_of_peak_sustained_active")
    if busy is None:
        per_cycle = _value(figures, "smsp__issue_active.avg.per_cycle_active")
        busy = per_cycle * 100 if per_cycle is not None else 50.0
    return max(0.0, 1 - busy / 100)


def _launch(profile: Profile, figures: Mapping[str, Metric]) -> Iterator[Limit]:
    top = profile.kernels[0] if profile.kernels else None
    if top is None:
        return
    share = top.time_ns / max(1.0, sum(kernel.time_ns for kernel in profile.kernels))
    waves = _value(figures, "launch__waves_per_multiprocessor")
    if waves is not None and waves < 1:
        evidence = f"{waves:.2f} waves: {_dims(top.grid)} blocks"
        advice = "more, smaller blocks; split the reduction (split-K) or a persistent kernel"
        yield Limit("the grid does not fill the device", (1 - waves) * share, evidence, advice)
    elif waves is not None and waves < 6 and waves % 1:
        tail = 1 - waves / -(-waves // 1)
        evidence = f"{waves:.2f} waves, the last one partly empty"
        yield Limit("tail: the last wave", tail * share, evidence, "block count a multiple of what fits, or persistent")
    if profile.bound is Bound.LATENCY:
        yield from _occupancy(top, share)
    launches = sum(kernel.launches for kernel in profile.kernels)
    if launches > 1 and top.launches < launches:
        evidence = f"{launches} launches of {len(profile.kernels)} kernels; the longest has {share:.0%}"
        yield Limit("several kernels", 1 - share, evidence, "fuse them: each writes and reads memory again")


def _occupancy(kernel: Kernel, share: float) -> Iterator[Limit]:
    if kernel.occupancy is not None and kernel.occupancy < 0.5:
        evidence = (
            f"{kernel.occupancy:.0%} of the warps that fit, {kernel.registers} registers, {kernel.shared_bytes} B"
        )
        advice = "fewer registers or less shared memory a block, or more independent work a thread"
        yield Limit("few warps to hide latency", (0.5 - kernel.occupancy) * share, evidence + " shared", advice)


def _arithmetic(profile: Profile, figures: Mapping[str, Metric], peaks: Peaks) -> Iterator[Limit]:
    tensor = _value(figures, ncu.TENSOR_BUSY)
    roofline = profile.roofline
    if profile.bound is Bound.COMPUTE and tensor is not None and tensor < 5 and roofline and peaks.flops:
        kind = roofline.flop_type or "general"
        advice = "use tl.dot, wgmma or mma where products allow it"
        yield Limit("tensor cores idle", 0.5, f"they are busy {tensor:.0f}% of the time; {kind} units do it", advice)


def _gaps(call: Call, candidate_ns: float) -> Iterator[Limit]:
    """Time between kernels: launches that the host issues too slowly, or synchronization."""
    launches = sum(kernel.launches for kernel in call.kernels)
    whole = max(candidate_ns, call.busy_ns)
    if whole > 0 and call.busy_ns < whole:
        share = 1 - call.busy_ns / whole
        evidence = f"{call.busy_ns / 1e3:.1f} us of {whole / 1e3:.1f} us in kernels, {launches} launches"
        advice = "fewer launches (fuse), no synchronization or Python work between them, a CUDA graph"
        yield Limit("time outside kernels", share, evidence, advice)
    if call.kernels and launches > 1:
        share = 1 - call.kernels[0].time_ns / max(1.0, call.busy_ns)
        evidence = f"{launches} launches; the longest kernel has {1 - share:.0%}"
        yield Limit("several kernels", share * 0.5, evidence, "fuse them: each writes and reads memory again")


# -- text --------------------------------------------------------------------------------------------------------------


def profile_text(profile: Profile) -> str:
    """At most LINES lines for a prompt or a terminal."""
    if profile.tool is Tool.NONE:
        return f"profile: none ({profile.reason})"[:LINE_CHARS]
    lines = [f"profile by {profile.tool} on {profile.device}: bound by {profile.bound}"]
    if profile.reason:
        lines.append(f"note: {profile.reason}")
    lines += _roofline_lines(profile)
    for kernel in profile.kernels[:TOP_KERNELS]:
        lines.append(_kernel_line(profile, kernel))
    for number, limit in enumerate(profile.limits, 1):
        lines.append(f"limit {number}: {limit.title} (up to {limit.share:.0%}): {limit.evidence}")
        lines.append(f"   try: {limit.advice}")
    figures = [f"{_SHOWN.get(metric.name, metric.name)} {_figure(metric)}" for metric in _chosen(profile)]
    if figures:
        lines.append("metrics: " + ", ".join(figures))
    return "\n".join(line[:LINE_CHARS] for line in lines)


def _roofline_lines(profile: Profile) -> list[str]:
    roofline = profile.roofline
    if roofline is None:
        return []
    parts = []
    if roofline.memory is not None:
        parts.append(f"memory {roofline.memory:.0%} of peak ({_bytes(roofline.bytes or 0)})")
    if roofline.compute is not None:
        parts.append(f"{roofline.flop_type} {roofline.compute:.0%} of peak ({(roofline.flops or 0) / 1e9:.2f} Gflop)")
    if not parts:
        return []
    counted = "hardware counters" if roofline.counted == Tool.NCU else "the task's least work"
    return [f"roofline: {', '.join(parts)}; from {counted}, peaks from {roofline.peaks}"]


def _kernel_line(profile: Profile, kernel: Kernel) -> str:
    whole = max(1.0, sum(each.time_ns for each in profile.kernels))
    words = [f"{kernel.name[:48]}: {kernel.time_ns / 1e3:.1f} us ({kernel.time_ns / whole:.0%})"]
    if kernel.launches > 1:
        words.append(f"{kernel.launches} launches")
    if kernel.grid and kernel.block:
        words.append(f"grid {_dims(kernel.grid)} block {_dims(kernel.block)}")
    if kernel.registers is not None:
        words.append(f"{kernel.registers} regs, {kernel.shared_bytes or 0} B shared")
    if kernel.occupancy is not None:
        words.append(f"occupancy {kernel.occupancy:.0%}")
    return "; ".join(words)


_SHOWN = {
    ncu.SM_BUSY: "SM busy", ncu.MEMORY_BUSY: "memory busy", ncu.DRAM_BUSY: "DRAM busy", ncu.TENSOR_BUSY: "tensor busy",
    "lts__t_sector_hit_rate.pct": "L2 hits", "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots busy",
}  # fmt: skip


def _chosen(profile: Profile) -> list[Metric]:
    shown = [metric for name in _SHOWN for metric in profile.metrics if metric.name == name]
    return shown or [metric for metric in profile.metrics if metric.value][:6]


def _figure(metric: Metric) -> str:
    return f"{metric.value:.4g}{'' if metric.unit == '%' else ' '}{metric.unit}".rstrip()


def _value(figures: Mapping[str, Metric], name: str) -> float | None:
    metric = figures.get(name)
    return None if metric is None else metric.value


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _dims(dims: tuple[int, int, int] | None) -> str:
    return "x".join(str(size) for size in dims) if dims else "?"

"""Which role each evaluator GPU has, which job runs next, how much may be forked: pure functions.

Pool and simulator (bench/elastic.py) call the same ones; policy_state.py feeds them from incremental counts, so that a
decision costs the same at 4 GPUs and at 1,024. All times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum, StrEnum
from math import ceil, exp, isfinite
from typing import NamedTuple

NEVER = float("-inf")


class Role(StrEnum):
    """What an evaluator GPU does: checks correctness, or times and profiles alone under a quiet lease."""

    VALIDATE = "validate"
    PROFILE = "profile"

    @property
    def other(self) -> Role:
        return Role.PROFILE if self is Role.VALIDATE else Role.VALIDATE


class Urgency(IntEnum):
    """Order of the jobs of one search, most urgent first."""

    ENDS = 0
    NEWEST = 1
    REST = 2


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """One configuration for every load. Raises ValueError naming field and value when one is out of range.

    dwell_s: a GPU that has switched keeps its role that long (at most one switch per GPU in it).
    switch_s: what a role switch costs; a switch that would finish later than the next GPU of the role is not made.
    horizon_s: time in which a backlog should drain; a shorter one follows the queues more than the arrival rates.
    margin: hysteresis, in GPUs (plus margin_share of the pool): the excess that a role gives away while it has work.
    rate_tau_s: time constant of the arrival rates.  service_weight: weight of a new service time in its estimate.
    head_start_s: attained GPU-seconds, or seconds of age, that the urgency of its first job lets a search forward by.
    fair_after_s: backlog, in seconds per GPU, above which searches are served by attained GPU-seconds, not by age.
    credit_s: GPU-seconds below the least served search that one returning from idleness may start at.
    reserve, reserve_share: idle GPUs kept ready in a role while the other has more: a number, a share of the pool.
    balance_share: how uneven idle GPUs must be for that, as a share of the pool (2 GPUs at least).
    share_s: turn of a role on a single GPU while the other role has work.
    quiet_slack: a quiet lease lasts that many times the expected seconds, at most quiet_max_s.
    """

    dwell_s: float = 2.0
    switch_s: float = 0.25
    horizon_s: float = 20.0
    margin: float = 1.0
    margin_share: float = 0.05
    rate_tau_s: float = 60.0
    service_weight: float = 0.1
    head_start_s: tuple[float, float, float] = (20.0, 5.0, 0.0)
    fair_after_s: float = 30.0
    credit_s: float = 100.0
    reserve: int = 2
    reserve_share: float = 0.2
    balance_share: float = 0.05
    share_s: float = 8.0
    quiet_slack: float = 2.0
    quiet_max_s: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            values = value if isinstance(value, tuple) else (value,)
            if any(isinstance(one, bool) or not isinstance(one, (int, float)) or not one >= 0 for one in values):
                raise ValueError(f"{field.name}={value!r}: use a number of at least 0")
        if not 0 < self.service_weight <= 1:
            raise ValueError(f"service_weight={self.service_weight!r}: use a number above 0 and at most 1")
        for name in ("dwell_s", "horizon_s", "rate_tau_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: use a number above 0")


class JobView(NamedTuple):
    """A job that waits. submitted: its candidate, so that a late one is profiled first.

    fork: number of its fork in the search, growing.  could_end: a good result ends the reasoning.
    deadline: after it the job is reported, not run.  expected_s: GPU-seconds it should take.
    builds: kind of the C++ build that comes first ("" for none): its seconds are known by kind (policy_builds.py).
    """

    id: str
    search: str
    role: Role
    submitted: float
    expected_s: float
    fork: int = 0
    could_end: bool = False
    priority: float = 0.0
    deadline: float | None = None
    builds: str = ""


class GpuView(NamedTuple):
    """An idle GPU. switched: when it last changed roles.  free_bytes, lent_bytes: of its memory, to the KV tier."""

    number: int
    role: Role
    switched: float = NEVER
    free_bytes: int = 0
    lent_bytes: int = 0


class RoleLoad(NamedTuple):
    """Demand for a role. waiting: jobs.  waiting_s: their expected GPU-seconds.  oldest: submission of the oldest one.

    gpus: that have the role or are switching to it.  idle: of these.  coming: of these, switching without a job.
    arrival_per_s, service_s: estimates.
    """

    waiting: int
    waiting_s: float
    gpus: int
    idle: int
    arrival_per_s: float
    service_s: float
    oldest: float = float("inf")
    coming: int = 0

    @property
    def running_s(self) -> float:
        """Expected GPU-seconds left of the jobs at work, which are half done on average."""
        return 0.5 * self.service_s * (self.gpus - self.idle - self.coming)


class Targets(NamedTuple):
    """GPUs that each role should have; they add up to the pool."""

    validate: int
    profile: int

    def of(self, role: Role) -> int:
        return self.validate if role is Role.VALIDATE else self.profile


class Rate(NamedTuple):
    """Events per second, exponentially forgotten."""

    per_s: float = 0.0
    at: float = 0.0

    def seen(self, now: float, tau_s: float) -> Rate:
        return Rate(self.at_time(now, tau_s) + 1.0 / tau_s, now)

    def at_time(self, now: float, tau_s: float) -> float:
        return self.per_s * exp(-max(0.0, now - self.at) / tau_s)


def urgency(job: JobView, newest_fork: int) -> Urgency:
    """What could end a reasoning first, then the newest fork of the search, then the rest."""
    if job.could_end:
        return Urgency.ENDS
    return Urgency.NEWEST if job.fork >= newest_fork else Urgency.REST


def fair_key(attained_s: float, weight: float, first: Urgency, config: PolicyConfig) -> float:
    """While work waits long, searches are served in this order: least attained GPU-seconds per weight."""
    return attained_s / weight - config.head_start_s[first]


def age_key(oldest: float, first: Urgency, config: PolicyConfig) -> float:
    """While everyone is served soon, searches are served in this order: longest wait of a job (submitted at oldest)."""
    return oldest - config.head_start_s[first]


def fairness_binds(load: RoleLoad, gpus: int, config: PolicyConfig) -> bool:
    """Whether a role's backlog is so long that serving the oldest first would give the pool to who asks most."""
    return load.waiting_s > config.fair_after_s * gpus


def work_s(load: RoleLoad, config: PolicyConfig) -> float:
    """GPU-seconds that a role must do within the horizon: its backlog and what will arrive."""
    return load.waiting_s + load.arrival_per_s * load.service_s * config.horizon_s


def target_roles(validate: RoleLoad, profile: RoleLoad, config: PolicyConfig) -> Targets:
    """GPUs in proportion to work; a role with work has one at least when there are two. Nothing to do: no change."""
    gpus = validate.gpus + profile.gpus
    first, second = work_s(validate, config), work_s(profile, config)
    if first + second <= 0:
        return Targets(validate.gpus, profile.gpus)
    share = round(gpus * first / (first + second))
    least = 1 if gpus >= 2 and (validate.waiting or first > 0) else 0
    most = gpus - 1 if gpus >= 2 and (profile.waiting or second > 0) else gpus
    share = min(max(share, least), most)
    return Targets(share, gpus - share)


def may_switch(gpu: GpuView, now: float, config: PolicyConfig) -> bool:
    return now - gpu.switched >= config.dwell_s


def served_meanwhile(load: RoleLoad, config: PolicyConfig) -> float:
    """Jobs that a role's own GPUs will start while another GPU would still be switching to it."""
    busy = load.gpus - load.idle - load.coming
    return load.idle + load.coming + (busy * config.switch_s / load.service_s if load.service_s > 0 else 0.0)


def should_switch(gpu: GpuView, own: RoleLoad, other: RoleLoad, now: float, config: PolicyConfig) -> bool:
    """Whether an idle GPU takes up the other role now, in which jobs wait.

    Without work of its own it goes where work waits, unless it is the last one idle and the GPUs there free up sooner
    than it could be ready.
    With work of its own it goes when the other role has no GPU, or when its role is above target by the hysteresis.
    """
    if not other.waiting or not may_switch(gpu, now, config):
        return False
    if not own.waiting:
        return other.gpus == 0 or own.idle > 1 or other.waiting > served_meanwhile(other, config)
    total = own.gpus + other.gpus
    if total == 1:
        return now - gpu.switched >= config.share_s and other.oldest < own.oldest
    if other.gpus == 0:
        return True
    if own.gpus <= 1:
        return False
    own_is_validate = gpu.role is Role.VALIDATE
    targets = target_roles(own, other, config) if own_is_validate else target_roles(other, own, config)
    return own.gpus - targets.of(gpu.role) > config.margin + config.margin_share * total


def should_prepare(gpu: GpuView, own: RoleLoad, other: RoleLoad, now: float, config: PolicyConfig) -> bool:
    """Whether an idle GPU switches although nothing waits, so that the next job of the other role finds one ready."""
    if own.waiting or other.waiting or not may_switch(gpu, now, config) or other.arrival_per_s <= 0:
        return False
    total = own.gpus + other.gpus
    reserve = max(config.reserve, round(config.reserve_share * total))
    ready = other.idle + other.coming
    return ready < reserve and own.idle - ready >= max(2, config.balance_share * total)


LATE_SHARE = 0.025
"""Of a search's time so far: what candidates without a verdict get once the base's own answer is known to be right. As
much as the adaptive trigger lets forks cost; on two H200 a search had waited 7.7 s of 90 for one that was no better."""


def late_s(grace_s: float, waited_s: float, elapsed_s: float, *, own_right: bool) -> float:
    """Seconds that candidates without a verdict still get after a base has answered.

    grace_s: what they get at most, from its answer on.  waited_s: of it, so far.  elapsed_s: since the search began.
    own_right: its own answer is judged and right, so the client could have it now.
    """
    left = max(0.0, grace_s - waited_s)
    return min(left, LATE_SHARE * elapsed_s) if own_right else left


def late_window_s(grace_s: float, elapsed_s: float, write_s: float, judge_s: float) -> float:
    """Seconds after the end of its reasoning, elapsed_s into the search, that a base leaves to others if it answers
    right: until its answer is written and judged, and late_s. Without a grace, as in a stream, the answer can't be
    replaced once it begins: 0."""
    if grace_s <= 0:
        return 0.0
    judged = min(judge_s, grace_s)
    return write_s + judged + late_s(grace_s, judged, elapsed_s + write_s + judged, own_right=True)


class Admission(NamedTuple):
    """Advice to the controller. forks: how many to make now.  feedback_s: when the first one's verdict is expected.

    idle: the pool has GPUs and nothing to do, and nothing is coming.
    """

    forks: int
    feedback_s: float
    reason: str
    idle: bool = False


def admit(
    wanted: int,
    remaining_s: float,
    validate: RoleLoad,
    profile: RoleLoad,
    *,
    compile_s: float = 0.0,
    generate_s: float = 0.0,
    coming: int = 0,
    grace_s: float = 0.0,
    elapsed_s: float = 0.0,
) -> Admission:
    """How many of the forks wanted would be judged before the reasoning ends by itself, remaining_s from now.

    A fork is generated and compiled while the backlog drains, then it is validated and profiled; each further one waits
    for the pool to take it. It must be written before the reasoning ends; its verdict may come as much later as a right
    answer of the base, written and judged as fast as a fork's, leaves it of grace_s (late_window_s).
    elapsed_s: since the search began.
    coming: candidates of forks that are being written already.
    When the end is not known (remaining_s is not finite) all are admitted; else with no GPU in the pool none is.
    """
    gpus = validate.gpus + profile.gpus
    waiting = validate.waiting + profile.waiting
    free = validate.idle + profile.idle
    idle = 0 < gpus == free and waiting + coming == 0
    service = validate.service_s + profile.service_s
    backlog = validate.waiting_s + profile.waiting_s + validate.running_s + profile.running_s + coming * service
    wait = 0.0 if waiting + coming < free else backlog / max(gpus, 1)
    first = max(generate_s + compile_s, wait) + service if gpus else float("inf")
    if not isfinite(remaining_s):
        return Admission(wanted, first, "", idle)
    if gpus == 0:
        return Admission(0, first, "no evaluator GPU")
    late = late_window_s(grace_s, elapsed_s + remaining_s, generate_s, compile_s + service)
    if generate_s > remaining_s or first > remaining_s + late:
        after = f", {late:.1f} s after it count" if late else ""
        left = f"{remaining_s:.1f} s of reasoning are left{after}"
        return Admission(0, first, f"written in {generate_s:.1f} s, feedback in {first:.1f} s, {left}", idle)
    each, spare = service / gpus, remaining_s + late - first
    forks = wanted if spare >= each * wanted else min(wanted, 1 + int(spare / each))
    return Admission(forks, first, "" if forks == wanted else f"{forks} of {wanted} would be judged in time", idle)


def to_reclaim(gpu: GpuView, need_bytes: int, chunk_bytes: int = 1) -> int:
    """Bytes of lent memory to ask back so that a job of need_bytes can start: whole chunks, never more than lent."""
    missing = need_bytes - gpu.free_bytes
    if missing <= 0:
        return 0
    return min(gpu.lent_bytes, ceil(missing / chunk_bytes) * chunk_bytes)


def starts_per_s(load: RoleLoad) -> float:
    """Jobs of a role that will begin in a second: what waits and arrives, as far as its GPUs get to it."""
    busy = load.gpus - load.idle
    able = load.idle + (busy / load.service_s if load.service_s > 0 else busy)
    return min(load.waiting + load.arrival_per_s, able)


def reclaim_ahead(gpus: list[GpuView], starts_per_s: float, lead_s: float, need_bytes: int) -> dict[int, int]:
    """Bytes to ask back by GPU index, before jobs wait for them: enough GPUs for the starts that lead_s will bring.

    GPUs with the least to give back come first, so that the KV tier loses least. lead_s: how long asking back takes.
    """
    wanted = ceil(starts_per_s * lead_s)
    short = {gpu.number: to_reclaim(gpu, need_bytes) for gpu in gpus}
    wanted -= sum(gpu.free_bytes >= need_bytes for gpu in gpus)
    able = [gpu for gpu in gpus if short[gpu.number] and gpu.free_bytes + gpu.lent_bytes >= need_bytes]
    able.sort(key=lambda gpu: (short[gpu.number], gpu.number))
    return {gpu.number: short[gpu.number] for gpu in able[: max(0, wanted)]}


def quiet_s(role: Role, expected_s: float, config: PolicyConfig) -> float:
    """How long KV copies must leave the GPU's memory alone: 0 for validation, bounded for timing and profiling."""
    return min(config.quiet_max_s, config.quiet_slack * max(expected_s, 1.0)) if role is Role.PROFILE else 0.0

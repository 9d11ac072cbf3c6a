"""Policy: its functions by worked-out cases, the pool's state by random histories that must keep the invariants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgen_engine.pools.policy import (
    GpuView,
    JobView,
    PolicyConfig,
    Role,
    RoleLoad,
    Targets,
    quiet_s,
    reclaim_ahead,
    should_switch,
    target_roles,
    to_reclaim,
)
from specgen_engine.pools.policy_state import PoolState, Snapshot, plan

V, P = Role.VALIDATE, Role.PROFILE
CONFIG = PolicyConfig()


def load(waiting: int = 0, gpus: int = 4, *, rate: float = 0.0, idle: int = 0, each_s: float = 5.0) -> RoleLoad:
    return RoleLoad(waiting, waiting * each_s, gpus, idle, rate, each_s)


def job(name: str, search: str = "s", role: Role = V, at: float = 0.0, expected_s: float = 5.0, **more) -> JobView:
    return JobView(name, search, role, at, expected_s, **more)


def pool(*roles: Role, searches: tuple[str, ...] = ("s",), config: PolicyConfig = CONFIG) -> PoolState:
    state = PoolState(config)
    for search in searches:
        state.add_search(search)
    for index, role in enumerate(roles):
        state.add_gpu(index, role)
    return state


def order(state: PoolState, gpu: int = 0, step_s: float = 0.0) -> Iterator[str]:
    """Names in the order in which the pool's one GPU gets the jobs."""
    now = 1_000.0
    while assignments := state.decide(now).assignments:
        assert assignments[0].job is not None
        yield assignments[0].job.id
        now += 100.0
        state.release(gpu, now, step_s or assignments[0].job.expected_s)


@pytest.mark.parametrize(
    ("validate", "profile", "expected"),
    [
        (load(12), load(4), Targets(6, 2)),
        (load(100), load(1), Targets(7, 1)),
        (load(1), load(100), Targets(1, 7)),
        (load(5), load(0), Targets(8, 0)),
        (load(0, rate=0.3), load(0, rate=0.1), Targets(6, 2)),
        (load(0, gpus=3), load(0, gpus=5), Targets(3, 5)),
        (load(1, gpus=1), load(1, gpus=0), Targets(0, 1)),
    ],
)
def test_gpus_in_proportion_to_work_and_one_at_least_for_each(validate, profile, expected) -> None:
    assert target_roles(validate, profile, CONFIG) == expected


@pytest.mark.parametrize(
    ("own", "other", "since", "expected"),
    [
        (load(0), load(9), 5.0, True),
        (load(0), load(9), 1.9, False),
        (load(0), load(0), 5.0, False),
        (load(3), load(1, gpus=0), 5.0, True),
        (load(3, gpus=1), load(30, gpus=7), 5.0, False),
        (load(10, gpus=4), load(18, gpus=4), 5.0, False),
        (load(1, gpus=6), load(30, gpus=2), 5.0, True),
        (load(0, gpus=4), load(1, gpus=400, each_s=1.0), 5.0, False),
    ],
    ids=[
        "idle",
        "dwells",
        "no work",
        "other has none",
        "last of its role",
        "hysteresis",
        "excess",
        "others free sooner",
    ],
)
def test_when_a_gpu_switches(own, other, since, expected) -> None:
    assert should_switch(GpuView(0, V, switched=100.0), own, other, 100.0 + since, CONFIG) is expected


def test_a_single_gpu_gives_each_role_its_turn() -> None:
    own, other = load(2, gpus=1)._replace(oldest=90.0), load(2, gpus=0)._replace(oldest=50.0)
    gpu = GpuView(0, V, switched=100.0)
    assert not should_switch(gpu, own, other, 100.0 + CONFIG.share_s - 1, CONFIG)
    assert should_switch(gpu, own, other, 100.0 + CONFIG.share_s, CONFIG)
    assert not should_switch(gpu, own._replace(oldest=10.0), other, 200.0, CONFIG)


def test_lent_memory_is_asked_back_in_whole_chunks_and_before_it_is_needed() -> None:
    gpu = GpuView(0, V, free_bytes=10, lent_bytes=50)
    assert [to_reclaim(gpu, need, 8) for need in (10, 11, 40, 500)] == [0, 8, 32, 50]
    gpus = [gpu, GpuView(1, V, free_bytes=30, lent_bytes=40), GpuView(2, V, free_bytes=40), GpuView(3, V, free_bytes=1)]
    assert reclaim_ahead(gpus, starts_per_s=1.0, lead_s=0.9, need_bytes=40) == {}
    assert reclaim_ahead(gpus, starts_per_s=1.0, lead_s=2.0, need_bytes=40) == {1: 10}
    assert reclaim_ahead(gpus, starts_per_s=1.0, lead_s=9.0, need_bytes=40) == {1: 10, 0: 30}


def test_only_profiling_holds_a_quiet_lease_and_a_bounded_one() -> None:
    assert [quiet_s(V, 5.0, CONFIG), quiet_s(P, 5.0, CONFIG), quiet_s(P, 1e6, CONFIG)] == [
        0.0,
        10.0,
        CONFIG.quiet_max_s,
    ]
    state = pool(V, P)
    state.submit(job("v"), 0.0)
    state.submit(job("p", role=P, at=0.1), 0.1)
    assert {one.job.id: one.quiet_s for one in state.decide(0.2).assignments if one.job} == {"v": 0.0, "p": 10.0}


@pytest.mark.parametrize(
    ("field", "value"), [("dwell_s", 0.0), ("margin", -1.0), ("service_weight", 2.0), ("reserve", True)]
)
def test_a_configuration_out_of_range_is_one_clear_error(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field}={value}: use a number"):
        PolicyConfig(**{field: value})


def test_what_could_end_first_then_the_newest_fork_then_the_oldest() -> None:
    state = pool(V)
    for number in range(4):
        state.submit(job(f"f{number}", at=float(number), fork=number), float(number))
    state.submit(job("slow end", at=5.0, could_end=True, expected_s=9.0), 5.0)
    state.submit(job("quick end", at=6.0, could_end=True, expected_s=2.0), 6.0)
    assert list(order(state)) == ["quick end", "slow end", "f3", "f0", "f1", "f2"]


def test_a_long_backlog_is_served_by_attained_seconds_and_weight() -> None:
    state = pool(V, searches=("greedy", "small"))
    state.add_search("heavy", weight=3.0)
    for number in range(30):
        for search in ("greedy", "greedy", "heavy") if number else ("greedy", "small", "heavy"):
            at = len(state.queues[V]) / 100
            state.submit(job(f"{search} {number} {at}", search, at=at, expected_s=10.0, fork=number), at)
    first = [name.split()[0] for name in order(state)][:13]
    assert first.count("small") == 1
    assert first.index("small") <= 3
    assert 2 <= first.count("heavy") / first.count("greedy") <= 4


def test_a_short_backlog_is_served_by_age() -> None:
    state = pool(V, searches=("a", "b"))
    for number, search in enumerate(("a", "a", "b")):
        state.submit(job(f"{search}{number}", search, at=10.0 * number, fork=9 if number != 1 else 1), 10.0 * number)
    assert list(order(state)) == ["a0", "a1", "b2"]


def test_a_deadline_passed_in_the_queue_is_reported_once_and_never_run() -> None:
    state = pool(V)
    state.submit(job("first", deadline=50.0), 0.0)
    state.submit(job("late", at=1.0, fork=1, deadline=3.0), 1.0)
    assert [one.job.id for one in state.decide(2.0).assignments if one.job] == ["late"]
    assert [one.id for one in state.decide(50.0).expired] == ["first"]
    assert state.decide(51.0).expired == ()
    with pytest.raises(ValueError, match=r"deadline=51\.0: it has passed"):
        state.submit(job("gone", deadline=51.0), 51.0)


def test_a_finished_search_loses_queued_and_running_jobs() -> None:
    state = pool(V, V, searches=("ends", "stays"))
    for number in range(3):
        state.submit(job(f"e{number}", "ends", at=float(number), fork=number), float(number))
    running = {one.gpu for one in state.decide(3.0).assignments}
    state.submit(job("s0", "stays", at=4.0), 4.0)
    cancelled = state.cancel_search("ends")
    assert (len(cancelled.queued), set(cancelled.running)) == (1, running)
    for gpu in cancelled.running:
        state.release(gpu, 4.1, 1.1, finished=False)
    state.end_search("ends")
    assert [one.job.id for one in state.decide(5.0).assignments if one.job] == ["s0"]
    state.check_integrity()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.submit(job("j", "nobody"), 0.0), "search='nobody': the pool does not know it; add it first"),
        (lambda s: s.add_gpu(0, V), "gpu=0: it is in the pool already"),
        (lambda s: s.release(0, 0.0, 0.0), "gpu=0: it has nothing to be released from"),
        (lambda s: s.remove_gpu(7), "gpu=7: it is not in the pool (it has [0])"),
        (lambda s: s.add_search("s"), "search='s': it is in the pool already"),
        (lambda s: s.cancel_search("t"), "search='t': the pool does not know it"),
    ],
)
def test_unknown_names_are_one_clear_error(call, message: str) -> None:
    state = pool(V)
    with pytest.raises(ValueError) as raised:
        call(state)
    assert str(raised.value) == message
    state.check_integrity()


def test_plan_decides_like_the_state_that_saw_the_events() -> None:
    jobs = tuple(job(f"{search}{n}", search, at=n / 10, fork=n) for n in range(6) for search in ("a", "b"))
    snapshot = Snapshot(
        now=5.0,
        gpus=(GpuView(0, V), GpuView(1, P), GpuView(2, P, switched=4.0)),
        busy={V: 2, P: 0},
        jobs=jobs,
        searches=(("a", 1.0, 30.0), ("b", 2.0, 0.0)),
        arrival_per_s={V: 1.0, P: 0.1},
        service_s={V: 5.0, P: 5.0},
    )
    decision = plan(snapshot)
    assert {(one.gpu, one.role, one.switch) for one in decision.assignments} == {(0, V, False), (1, V, True)}
    assert decision.wake_at == pytest.approx(6.0)
    assert plan(snapshot) == decision


class History:
    """A pool and what an outsider saw of it."""

    def __init__(self, gpus: int) -> None:
        self.state = pool(*[V if index % 2 else P for index in range(gpus)], searches=("a", "b", "c"))
        self.now = 0.0
        self.jobs = 0
        self.open: set[str] = set()
        self.over: list[str] = []
        self.running: dict[int, str | None] = {}
        self.switched: dict[int, float] = {}
        self.next_gpu = gpus

    def submit(self, search: str, role: Role, deadline: bool) -> None:
        name = f"j{self.jobs}"
        self.jobs += 1
        self.open.add(name)
        limit = self.now + 7.0 if deadline else None
        view = job(name, search, role, self.now, 3.0, fork=self.jobs, could_end=role is P, deadline=limit)
        self.state.submit(view, self.now)

    def decide(self) -> None:
        decision = self.state.decide(self.now)
        for expired in decision.expired:
            self.end(expired.id)
        for one in decision.assignments:
            assert one.gpu not in self.running
            self.running[one.gpu] = one.job.id if one.job else None
            if one.switch:
                assert self.now - self.switched.get(one.gpu, float("-inf")) >= CONFIG.dwell_s
                self.switched[one.gpu] = self.now
            if one.job:
                assert one.job.role is one.role is self.state.gpu_roles()[one.gpu]
                assert one.job.id in self.open
        busy_jobs = [name for name in self.running.values() if name]
        assert len(busy_jobs) == len(set(busy_jobs))
        self.state.check_integrity()
        for role in Role:
            load = self.state.load(role, self.now)
            assert not (load.waiting and load.idle), "a GPU idles beside work of its own role"

    def end(self, name: str) -> None:
        self.open.remove(name)
        self.over.append(name)

    def release(self, gpu: int, *, finished: bool = True) -> None:
        name = self.running.pop(gpu)
        self.state.release(gpu, self.now, 3.0, finished=finished)
        if name:
            self.end(name)

    def cancel(self, search: str) -> None:
        cancelled = self.state.cancel_search(search)
        for name in cancelled.queued:
            self.end(name)
        for gpu in cancelled.running:
            self.release(gpu, finished=False)

    def lose(self, gpu: int) -> None:
        lost = self.state.remove_gpu(gpu)
        name = self.running.pop(gpu, None)
        assert (lost.id if lost else None) == name
        if lost is not None:
            self.state.submit(lost._replace(submitted=self.now, deadline=None), self.now)

    def gain(self, role: Role) -> None:
        self.state.add_gpu(self.next_gpu, role)
        self.next_gpu += 1


OPERATIONS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from("abc"), st.sampled_from(list(Role)), st.booleans()),
    st.tuples(st.just("release"), st.integers(0, 7)),
    st.tuples(st.just("wait"), st.floats(0.01, 4.0)),
    st.tuples(st.just("cancel"), st.sampled_from("abc")),
    st.tuples(st.just("lose"), st.integers(0, 7)),
    st.tuples(st.just("gain"), st.sampled_from(list(Role))),
)


@settings(max_examples=300, deadline=None)
@given(gpus=st.integers(1, 5), operations=st.lists(OPERATIONS, max_size=60))
def test_any_history_keeps_the_invariants_and_ends_every_job_once(gpus: int, operations: list[tuple]) -> None:
    history = History(gpus)
    for kind, *arguments in operations:
        if kind == "submit":
            history.submit(*arguments)
        elif kind == "wait":
            history.now += arguments[0]
        elif kind == "cancel":
            history.cancel(*arguments)
        elif kind == "gain":
            history.gain(*arguments)
        elif kind == "lose" and len(history.state.gpu_roles()) > 1:
            gpu = sorted(history.state.gpu_roles())[arguments[0] % len(history.state.gpu_roles())]
            history.lose(gpu)
        elif kind == "release" and history.running:
            history.release(sorted(history.running)[arguments[0] % len(history.running)])
        history.decide()
    for _ in range(2 * history.jobs + 50):
        if not history.open and not history.running:
            break
        history.now += CONFIG.share_s
        history.decide()
        for gpu in list(history.running):
            history.release(gpu)
    assert not history.open, "jobs that never end"
    assert sorted(history.over) == sorted(f"j{number}" for number in range(history.jobs))


@settings(max_examples=60, deadline=None)
@given(
    gpus=st.integers(2, 6), validate=st.integers(1, 30), profile=st.integers(1, 30), role=st.sampled_from(list(Role))
)
def test_both_roles_are_served_when_both_have_work(gpus: int, validate: int, profile: int, role: Role) -> None:
    state = pool(*[role] * gpus)
    for number in range(40 + max(validate, profile)):
        for one, count in ((V, validate), (P, profile)):
            if number < 40 + count:
                state.submit(job(f"{one}{number}", role=one, at=0.0, fork=number), 0.0)
    roles: set[Role] = set()
    for now in (1.0, 5.0, 9.0):
        roles = set()
        for one in state.decide(now).assignments:
            roles.add(one.role)
            state.release(one.gpu, now + 3.0, 3.0)
    assert roles == set(Role)
    assert set(state.gpu_roles().values()) == set(Role)


def test_a_decision_takes_less_than_a_millisecond_at_1024_gpus_and_512_searches() -> None:
    state = pool(*[V, P] * 512, searches=tuple(f"s{number}" for number in range(512)))
    took = []
    now = 0.0
    for number in range(6_000):
        now += 0.01
        started = time.thread_time()
        role = (V, P)[number % 3 == 0]
        state.submit(job(f"j{number}", f"s{number * 7 % 512}", role, now, fork=number), now)
        state.decide(now)
        if number > 2_000:
            state.release(number % 1024, now, 5.0)
            state.decide(now)
        took.append(time.thread_time() - started)
    assert sum(len(queue) for queue in state.queues.values()) > 500, "the queues must be deep for this to mean anything"
    assert statistics.quantiles(took, n=100)[98] < 1e-3, "CPU time, so that a busy machine does not count"


def test_idle_gpus_are_kept_in_both_roles_while_nothing_waits() -> None:
    state = pool(*[V] * 6)
    state.estimate(P, 1.0, 3.0, 100.0)
    assignments = state.decide(100.0).assignments
    assert [(one.role, one.job, one.switch) for one in assignments] == [(P, None, True)] * len(assignments)
    assert 1 <= len(assignments) <= 3
    for one in assignments:
        state.release(one.gpu, 100.3, 0.0)
    assert state.decide(101.0).assignments == ()
    state.submit(job("p", role=P, at=101.0), 101.0)
    assert [one.switch for one in state.decide(101.0).assignments if one.job] == [False]

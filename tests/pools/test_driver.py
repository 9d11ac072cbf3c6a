"""The driver on a scripted backend: what it asks for, and what becomes of each job, whatever the backend says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict
from specgen_engine.pools import dispatch
from specgen_engine.pools.accounting import Outcome, Spent
from specgen_engine.pools.base import Done, Event, NoSlot, Reached, SlotDown, SlotUp, Switched, Work
from specgen_engine.pools.driver import Driver
from specgen_engine.pools.job import outcome_value
from specgen_engine.pools.journal import Journal, JournalError
from specgen_engine.pools.metrics import PoolMetrics
from specgen_engine.pools.policy import Role
from tests.pools.burst import TASK


class Script:
    """A backend that does what the test tells it, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.work: dict[int, Work] = {}
        self.expected = -1.0
        self.tell: Callable[[Event], None] = lambda event: None

    def open(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell

    def run(self, slot: int, work: Work) -> None:
        self.work[slot] = work
        self.asked.append(("run", work.job))

    def switch(self, slot: int, role: Role) -> None:
        self.asked.append(("switch", role))

    def cancel(self, slot: int, job: str) -> None:
        self.asked.append(("cancel", job))

    def expect(self, starts_per_s: float) -> None:
        self.expected = starts_per_s

    def kill(self, slot: int) -> None:
        self.asked.append(("kill", slot))

    def describe(self) -> dict[str, object]:
        return {"device": "script", "workers": 1}

    async def close(self) -> None:
        self.asked.append(("close", None))

    # -- what slots say --------------------------------------------------------------------------------------------

    def up(self, slot: int) -> None:
        self.tell(SlotUp(slot, f"gpu{slot}", f"cuda:{slot}", "off"))

    def down(self, slot: int) -> None:
        self.tell(SlotDown(slot, "killed"))

    def done(self, slot: int, status: Status = Status.WRONG, work: Work | None = None, **stages: float) -> None:
        work = work or self.work[slot]
        verdict: dict[str, Any] = {"candidate": "c", "status": status, "stages": stages}
        if status is Status.CORRECT:
            verdict |= {"speedup": 1.0, "interval": [0.9, 1.1]}
        self.tell(Done(slot, work.job, work.attempt, {"job": work.job, "verdict": verdict}))


def on_driver(use: Callable[[Driver, Script], Awaitable[None]], **more: Any) -> None:
    async def session() -> None:
        script = Script()
        driver = Driver(script, **more)
        driver.start_soon()
        await use(driver, script)
        check = getattr(driver.state, "check_integrity", None)
        if check is not None and not driver.closing:
            check()
        await driver.close()

    asyncio.run(session())


def submit(driver: Driver, name: str = "x", **more: Any):
    return driver.submit(TASK, Candidate(name), **{"search": "s", **more})


def status_of(driver: Driver, job: Any) -> Status:
    entry = driver.ledger.journal.entry(job.id)
    assert entry is not None
    assert entry.outcome is not None
    return outcome_value(entry.outcome).status


def test_a_slot_changes_roles_for_a_job_and_runs_it_once_it_has() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        timed = submit(driver, stage="time")
        assert script.asked == [("switch", Role.PROFILE)]
        assert driver.snapshot()["roles"] == {"validate": 0, "profile": 1}
        script.tell(Switched(0))
        assert script.asked[1:] == [("run", timed.id)]
        assert script.work[0].quiet_s > 0
        assert script.work[0].op == "evaluate"
        script.done(0, Status.CORRECT, check=1.0, time=0.5, compile=9.0)
        verdict = await timed.verdict()
        assert (verdict.status, verdict.interval) == (Status.CORRECT, (0.9, 1.1))
        assert driver.ledger.account.seconds == {Spent("s", "time", Outcome.USEFUL): 1.5}
        assert status_of(driver, timed) is Status.CORRECT

    on_driver(use)


def test_a_job_cancelled_while_its_slot_changes_roles_never_runs() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        timed = submit(driver, stage="profile")
        timed.cancel()
        assert not timed.result.done()
        script.tell(Switched(0))
        assert (await timed.verdict()).status is Status.CANCELLED
        assert "run" not in dict(script.asked)
        after = submit(driver, "after", stage="profile")
        assert script.asked[-1] == ("run", after.id)
        script.done(0)
        assert driver.ledger.journal.counts() == {"queued": 0, "running": 0, "finished": 1, "reported": 1}

    on_driver(use)


def test_a_job_whose_slots_die_is_tried_twice_and_then_a_crash() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        job = submit(driver)
        first = script.work[0]
        script.tell(Reached(0, job.id, 1, Stage.CHECK))
        script.down(0)
        script.up(1)
        assert (script.work[1].job, script.work[1].attempt, job.tries) == (job.id, 2, 1)
        script.done(0, Status.CORRECT, work=first)
        script.done(1, Status.CORRECT, work=first)
        assert not job.result.done(), "a slot that was lost, or an earlier attempt, has no say"
        script.down(1)
        assert (await job.verdict()).status is Status.CRASH
        assert status_of(driver, job) is Status.CRASH
        script.up(2)
        assert 2 not in script.work
        assert driver.snapshot()["finished"] == {"crash": 1}

    on_driver(use)


def test_a_running_job_that_does_not_end_when_cancelled_has_its_slot_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "CANCEL_S", 0.05)

    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        stuck, polite = submit(driver, "stuck"), submit(driver, "polite")
        stuck.cancel()
        await asyncio.sleep(0.1)
        assert script.asked == [("run", stuck.id), ("cancel", stuck.id), ("kill", 0)]
        script.down(0)
        assert (await stuck.verdict()).status is Status.CANCELLED
        script.up(1)
        polite.cancel()
        script.done(1, Status.CANCELLED)
        await asyncio.sleep(0.1)
        assert script.asked[3:] == [("run", polite.id), ("cancel", polite.id)]

    on_driver(use)


def test_the_end_of_a_search_cancels_what_waits_and_what_runs_and_late_results_are_superseded() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        running, waiting, other = submit(driver, "a"), submit(driver, "b"), submit(driver, "c", search="t")
        assert driver.cancel_search("s") == 2
        assert (await waiting.verdict()).status is Status.CANCELLED
        assert script.asked[-1] == ("cancel", running.id)
        script.done(0, Status.WRONG, check=2.0)
        assert (await running.verdict()).status is Status.WRONG
        assert driver.ledger.account.by_outcome()[Outcome.SUPERSEDED] == 2.0
        assert script.work[0].job == other.id
        assert set(driver.ledger.searches) == {"t"}
        assert driver.cancel_search("s") == 0
        script.done(0)

    on_driver(use)


def test_deadlines_in_the_past_in_the_queue_and_on_a_slot() -> None:
    async def use(driver: Driver, script: Script) -> None:
        with pytest.raises(ValueError, match=r"deadline=.*: it has passed; give a later time\.monotonic\(\) value"):
            submit(driver, deadline=time.monotonic() - 0.1)
        script.up(0)
        runs = submit(driver, "runs", deadline=time.monotonic() + 0.05)
        waits = submit(driver, "waits", deadline=time.monotonic() + 0.05)
        assert (await waits.verdict()).status is Status.TIMEOUT
        await asyncio.sleep(0.02)
        assert script.asked == [("run", runs.id), ("cancel", runs.id)]
        script.done(0, Status.CANCELLED)
        later = submit(driver, "later")
        script.done(0)
        assert (await later.verdict()).status is Status.WRONG

    on_driver(use)


def test_a_strict_pool_takes_no_job_of_a_search_that_it_does_not_know_and_serves_on() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        with pytest.raises(ValueError, match="search='nobody': the pool does not know it; open it first"):
            submit(driver, search="nobody")
        with pytest.raises(ValueError, match="stage='bake': use one of evaluate, time, profile, check_task"):
            submit(driver, stage="bake")
        driver.open_search("s")
        job = submit(driver, job="mine")
        with pytest.raises(ValueError, match="job='mine': the journal has it already"):
            submit(driver, "y", job="mine")
        driver.cancel_search("s")
        with pytest.raises(ValueError, match="search='s': it has ended; open it first"):
            submit(driver)
        script.done(0)
        assert (await job.verdict()).status is Status.WRONG

    on_driver(use, strict=True)


@pytest.mark.parametrize("retry", [True, False])
def test_a_restart_takes_up_or_reports_what_the_journal_left_open(tmp_path: Path, retry: bool) -> None:
    path = tmp_path / "j.db"

    async def first(driver: Driver, script: Script) -> None:
        script.up(0)
        submit(driver, "runs", job="runs", priority=1.0)
        submit(driver, "waits", job="waits", fork=3)
        submit(driver, "late", job="late", deadline=time.monotonic() + 0.02)
        driver.ledger.journal.submit("torn", "s", "evaluate", '{"stage": "eva')
        driver.closing = True  # as a killed process would end: nothing is said

    on_driver(first, journal=Journal(path))
    time.sleep(0.05)

    async def second(driver: Driver, script: Script) -> None:
        resumed = driver.resume(retry=retry)
        ends = {entry.id: outcome_value(str(entry.outcome)).status for entry in resumed.reported}
        if not retry:
            assert ends["runs"] is ends["waits"] is ends["torn"] is Status.CRASH
            assert driver.ledger.jobs == {}
            return
        assert ends == {"late": Status.TIMEOUT, "torn": Status.CRASH}
        again = driver.ledger.jobs["waits"]
        assert (again.order.fork, again.order.task, again.order.candidate) == (3, TASK, Candidate("waits"))
        script.up(0)
        assert (script.work[0].job, script.work[0].attempt) == ("runs", 2)
        script.done(0)
        script.done(0)
        assert (await again.verdict()).status is Status.WRONG

    on_driver(second, journal=Journal(path))
    with Journal(path) as journal:
        counts = journal.counts()
    assert (counts["queued"], counts["running"], sum(counts.values())) == (0, 0, 4)


def test_the_check_of_a_reference_comes_before_everything_and_is_not_a_job() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        jobs = [submit(driver, str(number), priority=9.0) for number in range(3)]
        check = asyncio.ensure_future(driver.check_task(TASK))
        await asyncio.sleep(0)
        script.done(0)
        assert script.work[0].op == "check_task"
        script.tell(Done(0, script.work[0].job, script.work[0].attempt, {"task": "it is broken"}))
        assert await check == "it is broken"
        script.done(0)
        script.done(0)
        assert all([(await job.verdict()).status is Status.WRONG for job in jobs])
        assert driver.snapshot()["finished"] == {"wrong": 3}

    on_driver(use)


def test_a_job_goes_where_its_tasks_reference_is_among_the_latest_three() -> None:
    tasks = [Task(f"{TASK.source}# {number}\n", f"t{number}") for number in range(5)]

    async def use(driver: Driver, script: Script) -> None:
        async def one(number: int) -> int:
            """The slot that judged a candidate of that task."""
            script.work.clear()
            job = driver.submit(tasks[number], Candidate(f"{number} {len(script.asked)}"), search="s")
            (slot,) = script.work
            script.done(slot)
            await job.verdict()
            return slot

        script.up(0)
        assert [await one(number) for number in range(3)] == [0, 0, 0]
        script.up(1)
        assert await one(0) == 0
        assert await one(3) == 1, "the other would forget a reference for it"
        assert [await one(number) for number in (0, 3, 2, 1)] == [0, 1, 0, 0]
        assert await one(4) == 1, "though the other rested last"
        script.down(1)
        assert await one(4) == 0, "which forgets 0"
        script.up(2)
        assert [await one(number) for number in (2, 0, 4)] == [0, 2, 0]

    on_driver(use)


def test_forks_go_newest_first_where_they_are_numbered_and_by_age_where_not() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        submit(driver, "first")
        numbered = [submit(driver, f"n{fork}", fork=fork) for fork in (1, 2, 3)]
        order = []
        for _ in numbered:
            script.done(0)
            order.append(script.work[0].job)
        assert order == [numbered[2].id, numbered[0].id, numbered[1].id]
        plain = [submit(driver, f"p{number}", search="t") for number in range(3)]
        for job in plain:
            script.done(0)
            assert script.work[0].job == job.id
        script.done(0)

    on_driver(use)


def test_no_slot_at_all_ends_what_waits_and_start_says_why() -> None:
    async def use(driver: Driver, script: Script) -> None:
        job = submit(driver)
        script.tell(NoSlot("no CUDA here"))
        verdict: Verdict = await job.verdict()
        assert (verdict.status, verdict.reason) == (Status.CRASH, "no evaluation worker starts: no CUDA here")
        with pytest.raises(RuntimeError, match="no evaluation worker starts: no CUDA here"):
            await driver.start()

    on_driver(use)


def test_an_answer_that_cannot_be_read_ends_its_job() -> None:
    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        job = submit(driver)
        script.tell(Done(0, job.id, 1, {"job": job.id, "verdict": {"status": "splendid"}}))
        assert (await job.verdict()).status is Status.CRASH
        assert status_of(driver, job) is Status.CRASH

    on_driver(use)


def test_a_journal_that_cannot_be_written_any_more_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise JournalError("j.db: database or disk is full; see that it can be written and its disk has room")

    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        runs, waits, begins = submit(driver, "runs"), submit(driver, "waits"), submit(driver, "begins")
        for call in ("finish", "report", "start"):
            monkeypatch.setattr(driver.ledger.journal, call, full)
        waits.cancel()
        script.done(0)
        assert [(await job.verdict()).status for job in (runs, waits, begins)] == [
            Status.WRONG, Status.CANCELLED, Status.CANCELLED,
        ]  # fmt: skip
        monkeypatch.setattr(driver.ledger.journal, "submit", full)
        with pytest.raises(JournalError, match="disk is full; see that it can be written"):
            submit(driver, "more")
        assert driver.snapshot()["queued"] == 0

    on_driver(use)


def test_admission_asks_for_fewer_forks_as_the_backlog_grows() -> None:
    async def use(driver: Driver, script: Script) -> None:
        assert driver.admission(4, 100.0).reason == "no evaluator GPU"
        script.up(0)
        assert driver.admission(4, 1e3, generate_s=10.0).forks == 4
        for number in range(20):
            submit(driver, str(number))
        late = driver.admission(4, 20.0, generate_s=1.0)
        assert (late.forks, late.feedback_s > 20.0) == (0, True)
        driver.cancel_search("s")

    on_driver(use)


def test_the_backend_hears_how_many_jobs_will_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "EXPECT_S", 0.01)

    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        await asyncio.sleep(0.05)
        assert script.expected == 0.0
        for number in range(20):
            submit(driver, str(number))
        await asyncio.sleep(0.05)
        busy = script.expected
        assert 0.0 < busy < 1.0, "one slot, jobs of 5 s: no more than it gets to"
        script.up(1)
        await asyncio.sleep(0.05)
        assert script.expected > busy
        driver.cancel_search("s")
        script.done(0, Status.CANCELLED)
        script.done(1, Status.CANCELLED)

    on_driver(use)


def test_prometheus_counts_by_search_stage_and_outcome() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()

    async def use(driver: Driver, script: Script) -> None:
        script.up(0)
        submit(driver, "a")
        script.done(0, Status.WRONG, check=2.0)
        submit(driver, "b", search="t")
        driver.cancel_search("t")
        script.tell(Reached(0, script.work[0].job, 1, Stage.CHECK))
        script.done(0, Status.CANCELLED)
        labels = {"search": "s", "stage": "evaluate", "outcome": "useful"}
        assert registry.get_sample_value("specgen_pool_gpu_seconds_total", labels) == 2.0
        assert registry.get_sample_value(
            "specgen_pool_jobs_total", {"stage": "evaluate", "outcome": "cancelled"}
        ) == pytest.approx(1.0)
        assert registry.get_sample_value("specgen_pool_gpu_busy_share", {"gpu": "gpu0"}) > 0

    on_driver(use, metrics=PoolMetrics(registry))

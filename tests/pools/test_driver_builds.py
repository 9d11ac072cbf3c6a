"""The driver on scripted builders: a C++ candidate is built first, and gets a slot then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from specgen_engine.evaluation.base import Stage, Status
from specgen_engine.pools.base import Built, NoBuilder, Reached, Work
from specgen_engine.pools.driver import Driver
from tests.pools.test_driver import Script, status_of, submit


class Building(Script):
    """With one builder."""

    build_slots = 1

    def build(self, work: Work) -> None:
        self.asked.append(("build", work.job))

    def cancel_build(self, job: str) -> None:
        self.asked.append(("cancel_build", job))


CPP = "from torch.utils.cpp_extension import load_inline  # {}\nclass ModelNew: pass\n"


def on_builders(use: Callable[[Driver, Building], Awaitable[None]]) -> None:
    async def session() -> None:
        script = Building()
        driver = Driver(script)
        driver.start_soon()
        await use(driver, script)
        driver.state.check_integrity()  # type: ignore[attr-defined]
        await driver.close()

    asyncio.run(session())


def test_a_cpp_candidate_gets_a_slot_once_it_is_built() -> None:
    async def use(driver: Driver, script: Building) -> None:
        script.up(0)
        long, quick = submit(driver, CPP.format(1)), submit(driver)
        assert script.asked == [("build", long.id), ("run", quick.id)]
        assert {name: driver.snapshot()[name] for name in ("busy", "building", "queued")} == {
            "busy": 1, "building": 1, "queued": 0,
        }  # fmt: skip
        await asyncio.sleep(0.05)
        script.tell(Built(long.id, None, True))
        script.done(0)
        assert script.asked[-1] == ("run", long.id)
        script.tell(Reached(0, long.id, 1, Stage.COMPILE))
        script.done(0, Status.CORRECT, compile=0.5, check=1.0)
        verdict = await long.verdict()
        assert 0.55 <= verdict.stages["compile"] < 0.8
        assert long.seen == [Stage.QUEUED, Stage.COMPILE]
        assert status_of(driver, long) is Status.CORRECT

    on_builders(use)


def test_a_candidate_that_fails_in_its_build_has_its_verdict_from_there() -> None:
    async def use(driver: Driver, script: Building) -> None:
        script.up(0)
        broken = submit(driver, CPP.format(1))
        told = {"candidate": "c", "status": "compile_error", "reason": "no ;", "stages": {"compile": 0.0}}
        script.tell(Built(broken.id, {"job": broken.id, "verdict": told}, False))
        assert (await broken.verdict()).status is Status.COMPILE_ERROR
        assert "run" not in dict(script.asked)
        assert status_of(driver, broken) is Status.COMPILE_ERROR
        garbled = submit(driver, CPP.format(2))
        script.tell(Built(garbled.id, {"job": garbled.id, "verdict": {"status": "so-so"}}, False))
        assert (await garbled.verdict()).status is Status.CRASH

    on_builders(use)


def test_a_cancelled_build_is_killed_and_its_place_is_free_once_it_has_ended() -> None:
    async def use(driver: Driver, script: Building) -> None:
        script.up(0)
        first, second = submit(driver, CPP.format(1), search="one"), submit(driver, CPP.format(2), search="two")
        assert driver.cancel_search("one") == 1
        assert (await first.verdict()).status is Status.CANCELLED
        assert script.asked == [("build", first.id), ("cancel_build", first.id)]
        script.tell(Built(first.id, None, False))
        assert script.asked[-1] == ("build", second.id)
        script.tell(Built(second.id, None, False))
        assert script.asked[-1] == ("run", second.id)

    on_builders(use)


def test_where_no_builder_starts_slots_build() -> None:
    async def use(driver: Driver, script: Building) -> None:
        script.up(0)
        first = submit(driver, CPP.format(1))
        script.tell(NoBuilder("killed"))
        assert script.asked[-1] == ("run", first.id)
        script.down(0)
        script.up(1)
        assert script.asked[-1] == ("run", first.id)
        script.done(1)
        await first.verdict()

    on_builders(use)

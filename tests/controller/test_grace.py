"""The timer after a base's answer: set anew it counts from then, stopped it is silent."""

from __future__ import annotations

import asyncio

from specgen_engine.controller.grace import Grace


def test_only_the_latest_start_counts() -> None:
    async def body() -> None:
        rung: list[int] = []
        grace = Grace(lambda: rung.append(grace.times))
        grace.start(0.05)
        grace.start(0.2)
        await asyncio.sleep(0.1)
        assert rung == []
        await asyncio.sleep(0.2)
        assert rung == [2]

    asyncio.run(body())


def test_what_was_waited_counts_from_the_first_start() -> None:
    async def body() -> None:
        grace = Grace(lambda: None)
        assert grace.waited() == 0.0
        grace.start(5)
        await asyncio.sleep(0.1)
        grace.start(5)
        assert 0.1 <= grace.waited() < 1
        grace.stop()

    asyncio.run(body())


def test_a_stopped_one_is_silent() -> None:
    async def body() -> None:
        rung: list[int] = []
        grace = Grace(lambda: rung.append(1))
        grace.stop()
        grace.start(0.02)
        grace.stop()
        await asyncio.sleep(0.06)
        assert rung == []

    asyncio.run(body())

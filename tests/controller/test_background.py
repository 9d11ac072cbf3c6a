"""No task of a search outlives it."""

from __future__ import annotations

import asyncio

from specgen_engine.controller.background import Background


def test_close_waits_for_the_quick_ones_and_cancels_the_rest() -> None:
    ended: list[str] = []

    async def work(name: str, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
            ended.append(name)
        except asyncio.CancelledError:
            ended.append(f"{name} cancelled")
            raise

    async def body() -> None:
        background = Background()
        background.spawn(work("quick", 0.01))
        background.spawn(work("slow", 60))
        await background.close(0.2)
        assert ended == ["quick", "slow cancelled"]
        await background.close(0.2)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(body())


def test_what_fails_is_no_concern_of_the_others() -> None:
    async def fail() -> None:
        raise OSError("gone")

    async def body() -> None:
        background = Background()
        background.spawn(fail())
        await background.close(0.2)

    asyncio.run(body())

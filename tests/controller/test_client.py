"""What a client hears, and when."""

from __future__ import annotations

import asyncio

import pytest

from specgen_engine.controller.client import Client
from tests.controller.fakes import output


async def heard(client: Client) -> list[str]:
    client.end()
    return [one.text async for one in client.outputs()]


def test_a_named_task_holds_everything_back_until_released_and_nothing_after() -> None:
    async def body() -> None:
        client = Client(named=True)
        client.deliver(output("a"))
        client.deliver(output("b"))
        assert client._queue.empty()
        client.release()
        client.deliver(output("c"))
        assert await heard(client) == ["a", "b", "c"]

    asyncio.run(body())


def test_another_request_is_told_at_once() -> None:
    async def body() -> None:
        client = Client(named=False)
        client.deliver(output("a"))
        assert not client._queue.empty()
        assert await heard(client) == ["a"]

    asyncio.run(body())


def test_a_failure_comes_before_what_was_held_back() -> None:
    async def body() -> None:
        client = Client(named=True)
        client.deliver(output("a"))
        client.fail(KeyError("task"))
        with pytest.raises(KeyError):
            await heard(client)

    asyncio.run(body())

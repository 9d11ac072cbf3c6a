"""What the client of a search gets, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from specgen_engine.controller.engine import Output


class Client:
    """A request that named its task hears nothing before the task is known to work: an error must still be a 400."""

    def __init__(self, named: bool) -> None:
        self._holds = named
        self._held: list[Output] = []
        self._queue: asyncio.Queue[Output | BaseException | None] = asyncio.Queue()

    async def outputs(self) -> AsyncIterator[Output]:
        """Until end(); raises what fail() was given."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def deliver(self, output: Output) -> None:
        if self._holds:
            self._held.append(output)
        else:
            self._queue.put_nowait(output)

    def release(self) -> None:
        """Nothing is held back from now on."""
        self._holds = False
        for output in self._held:
            self._queue.put_nowait(output)
        self._held.clear()

    def fail(self, error: BaseException) -> None:
        self._queue.put_nowait(error)

    def end(self) -> None:
        self._queue.put_nowait(None)

"""What happens in the searches of one server, as it happens: a ring of events that readers follow at their own pace.

The ring is the only queue: a reader holds a position in it, so a slow one costs no memory; when the ring has moved past
its position it is told so ("missed") and starts again from a snapshot. Positions are EPOCH-NUMBER: a client may come
back with the last one it saw (SSE's Last-Event-ID), also after this server was replaced by another.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Literal, NamedTuple

RING = 4096
HEARTBEAT_S = 15.0


class Event(NamedTuple):
    """kind: started | progress | fork | candidate | stage | ended. data has `search`, `t` (seconds since its start)."""

    number: int
    kind: str
    data: dict[str, Any]


Item = Event | Literal["missed", "idle"]


class Feed:
    """publish() from the event loop's thread; follow() by any number of readers."""

    def __init__(self, size: int = RING) -> None:
        self.epoch = secrets.token_hex(4)
        self.last = 0
        self.readers = 0
        self._ring: deque[Event] = deque(maxlen=size)
        self._published = asyncio.Event()

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        self.last += 1
        self._ring.append(Event(self.last, kind, data))
        waiting, self._published = self._published, asyncio.Event()
        waiting.set()

    def position(self, number: int) -> str:
        """The id under which a client comes back after event `number`."""
        return f"{self.epoch}-{number}"

    def after(self, position: str | None) -> int | None:
        """The number of a client's last event; None when it is not ours, or what followed it is gone."""
        epoch, _, number = (position or "").partition("-")
        if epoch != self.epoch or not (number.isascii() and number.isdigit() and len(number) < 19):
            return None
        return int(number) if self._oldest() - 1 <= int(number) <= self.last else None

    async def follow(self, number: int, heartbeat_s: float = HEARTBEAT_S) -> AsyncIterator[Item]:
        """Events after `number`, for ever; "idle" when none came for heartbeat_s, "missed" when the ring moved past."""
        self.readers += 1
        try:
            while True:
                published = self._published
                if number < self._oldest() - 1:
                    number = self.last
                    yield "missed"
                elif number < self.last:
                    event = self._ring[number + 1 - self._oldest()]
                    number = event.number
                    yield event
                else:
                    try:
                        await asyncio.wait_for(published.wait(), heartbeat_s)
                    except TimeoutError:
                        yield "idle"
        finally:
            self.readers -= 1

    def kept(self, number: int) -> list[Event]:
        """Events after `number` that are still in the ring."""
        return [event for event in self._ring if event.number > number]

    def _oldest(self) -> int:
        return self._ring[0].number if self._ring else self.last + 1


def sse(kind: str, data: dict[str, Any], position: str) -> str:
    """One server-sent event; JSON has no line breaks, so data is one line."""
    return f"id: {position}\nevent: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"

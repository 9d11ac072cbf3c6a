"""The time that late candidates get once the base has answered by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

OWN_GRACES = 10
"""Graces more for the base's own verdict; by default 300 s, the limits of one evaluation together."""
REPLACEABLE_GRACES = 3
"""The same where a kernel faster than the reference could take its place. Whoever asks without forks waits for that
verdict too, and CUDA takes longer to build than one grace: in virtual time a kernel of a quarter and one of
half the own answer's speed replaced it on two of ten recorded GPU traces, 4.5 s sooner after 520 s and 980 s."""


def own_grace_s(grace_s: float, *, replaceable: bool) -> float:
    """Seconds more for the base's own verdict, once the grace has passed. replaceable: see REPLACEABLE_GRACES."""
    return grace_s * (REPLACEABLE_GRACES if replaceable else OWN_GRACES)


class Grace:
    """A timer that is set anew up to a few times. over: called when it has run out."""

    def __init__(self, over: Callable[[], None]) -> None:
        self._over = over
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self.times = 0

    def start(self, seconds: float) -> None:
        self.stop()
        loop = asyncio.get_running_loop()
        self._since = self._since if self.times else loop.time()
        self.times += 1
        self._timer = loop.call_later(seconds, self._over)

    def waited(self) -> float:
        """Seconds since it was started for the first time; 0 before that."""
        return asyncio.get_running_loop().time() - self._since if self.times else 0.0

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

"""HiCache's events of layers that have arrived, one for each launch: layers that come together are waited for once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.managers.cache_controller import LayerDoneCounter, LayerLoadingEvent

from specgen_engine.tier.movers import PageMover


class LaunchEvents(LayerLoadingEvent):
    """Of one load. A layer's event is that of the last layer of its launch; `arrivals` are the mover's."""

    def __init__(self, num_layers: int, mover: PageMover) -> None:
        super().__init__(num_layers)
        self._mover = mover
        self.arrivals: Sequence[int] = range(num_layers)

    def complete(self, layer_index: int) -> None:
        if layer_index == 0:
            self.arrivals = self._mover.arrivals
        if self.arrivals[layer_index] == layer_index:
            super().complete(layer_index)

    def wait(self, layer_index: int) -> None:
        super().wait(self.arrivals[layer_index])


class LaunchCounter(LayerDoneCounter):
    """A forward asks before each use of a layer's K and V; each of its streams waits for a launch once.

    `stream`: a number of the current stream.
    """

    def __init__(self, num_layers: int, mover: PageMover, stream: Callable[[], int]) -> None:
        super().__init__(num_layers)
        self.events = [LaunchEvents(num_layers, mover) for _ in range(self.num_counters)]
        self._stream = stream
        self._waited: set[tuple[int, int]] = set()

    def set_consumer(self, index: int) -> None:
        """A forward begins."""
        super().set_consumer(index)
        self._waited.clear()

    def wait_until(self, threshold: int) -> None:
        if self.consumer_index < 0:
            return
        event = self.events[self.consumer_index]
        wait = (event.arrivals[threshold], self._stream())
        if wait not in self._waited:
            self._waited.add(wait)
            event.wait(threshold)


def stream_number(device: Any) -> Callable[[], int]:
    """What tells the current stream of a device from others."""
    if torch.device(device).type != "cuda":
        return lambda: 0
    index = torch.device(device).index
    number = torch.cuda.current_device() if index is None else index
    return lambda: int(torch._C._cuda_getCurrentRawStream(number))

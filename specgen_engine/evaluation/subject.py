"""The candidate's process: imports ModelNew, calls it when told, lays its results out for the judge.

What is said here is said by a process that runs foreign code. The judge compares, the supervisor keeps the clock.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any

import torch

from .base import Candidate
from .candidates.load import give_weights, load_candidate
from .clock import clock_for, graph_times, warm_times
from .gpumemory import GpuRegion
from .guards import Guard
from .modules import TimedCalls, construct, shares_memory
from .profile.inprocess import profile_call
from .static import static_check
from .tensors import RegionFull, map_tensors, read_values, tensors_of, write_values
from .tripwires import Cheat, check_functions, check_l2, release_l2
from .wire import Channel, clip

GONE = "output of CUDAGraphs that has been overwritten"
"""In what torch's cudagraph_trees.py says of a result whose memory the next call took."""


class NotPlain(Exception):
    """The result is not made of plain tensors."""


class Subject:
    """Answers the supervisor's messages; see the methods named after their op."""

    def __init__(
        self,
        channel: Channel,
        candidate: Candidate,
        device: str,
        regions: tuple[int, ...],
        guards_off: frozenset[Guard] = frozenset(),
    ) -> None:
        self.channel, self.candidate, self.device, self.guards_off = channel, candidate, device, guards_off
        self.inputs: int | GpuRegion = -1
        self.outputs: int | GpuRegion = -1
        if regions:
            self.inputs, self.outputs = regions
        self.previous: Any = None
        self.calls: TimedCalls | None = None

    def load(self) -> None:
        self.module = load_candidate(self.candidate.source, Path.cwd(), self.device)

    def open_regions(self, fds: list[int], sizes: list[int]) -> None:
        """Regions on a GPU are the judge's; those on the host were inherited."""
        torch.cuda.init()
        torch.empty(1, device=self.device)  # makes the context that the mapping needs
        self.inputs, self.outputs = (GpuRegion.open(fd, size, self.device) for fd, size in zip(fds, sizes, strict=True))

    def open(self, fds: list[int], sizes: list[int]) -> dict[str, object]:
        """Context, clock and, on a GPU, the regions: what is not the candidate's own."""
        if fds:
            self.open_regions(fds, sizes)
        self.clock = clock_for(self.device)
        return {"event": "opened"}

    def construct(self, init: Any, seed: int) -> dict[str, object]:
        """ModelNew under the reference's seed, on the host: before the regions are open, where init has no tensors."""
        self.model = construct(self.module, "ModelNew", read_values(self.inputs, init), seed, "cpu")
        return {"event": "constructed"}

    def take_weights(self, weights: Any) -> dict[str, object]:
        """To the device; with the reference's weights where names and shapes agree."""
        if isinstance(self.model, torch.nn.Module):
            self.model = self.model.to(self.device)
        give_weights(self.model, lambda: read_values(self.inputs, weights, self.device))
        return {"event": "placed"}

    def run(self, inputs: Any) -> dict[str, object]:
        """One call on inputs not seen before; results, inputs as they are now and the former results are laid out."""
        arguments = read_values(self.inputs, inputs, self.device)
        self.clock.settle()
        start = time.perf_counter()
        result = self.model(*arguments)
        self.clock.settle()
        took = time.perf_counter() - start
        self._require_plain(result)
        aliases = shares_memory(tensors_of(result), tensors_of(arguments))
        outputs, end = write_values(self.outputs, result)
        after, end = write_values(self.outputs, arguments, end)
        former = self._former(end)
        self.previous = result
        return {
            "event": "ran",
            "outputs": outputs,
            "inputs": after,
            "aliases": aliases,
            "previous": former,
            "took": took,
        }

    def _former(self, offset: int) -> Any:
        """The result before, laid out as it is now; None where there is none, or where it says itself that it is gone.

        torch.compile(mode="reduce-overhead") reuses its results' memory and raises at any later access: no caller can
        take old numbers for new ones, so it is no silent reuse, which the judge rejects.
        """
        if self.previous is None:
            return None
        try:
            return write_values(self.outputs, self.previous, offset)[0]
        except RuntimeError as error:
            if GONE not in str(error):
                raise
            return None

    def stage(self, layouts: dict[str, Any]) -> dict[str, object]:
        """Take over the timing inputs; nothing is called yet."""
        self.previous = None  # the judge forgets it too when a timed call is compared
        sources = {int(slot): read_values(self.inputs, layout, self.device) for slot, layout in layouts.items()}
        if self.calls is None:
            self.calls = TimedCalls(self.model, sources, self.clock)
        self.calls.sources.update(sources)
        return {"event": "staged"}

    def time(self, sequence: list[int], moved: bool) -> dict[str, object]:
        """Times in ns on the slots of sequence; moved: at another place in memory than before."""
        assert self.calls is not None
        if moved:
            self.calls.move()
        if self.device.startswith("cuda"):
            release_l2(self.guards_off)
        times, self.last = self.calls.run(sequence, self.model)
        check_functions(self.guards_off)
        if self.device.startswith("cuda"):
            check_l2(self.guards_off)
        late, behind = self.clock.take_late(), self.clock.take_behind()
        return {"event": "timed", "ns": times, "late": late, "behind": behind}

    def warm_calls(self) -> dict[str, object]:
        """Times with the inputs in the L2 cache."""
        assert self.calls is not None
        working = self.calls.working
        return {"event": "timed", "ns": warm_times(self.device, lambda: self.model(*working))}

    def graph(self) -> dict[str, object]:
        """Times as a CUDA graph, or why there are none; show() then shows the last replay's result."""
        assert self.calls is not None
        working = self.calls.working
        try:
            times, self.last = graph_times(self.device, lambda: self.model(*working))
        except Exception as error:
            return {"event": "timed", "ns": [], "why": f"{type(error).__name__}: {error}"[:200]}
        return {"event": "timed", "ns": times, "why": ""}

    def show(self) -> dict[str, object]:
        """The result of the last timed call, apart from the timed block."""
        self._require_plain(self.last)
        outputs, end = write_values(self.outputs, self.last)
        assert self.calls is not None
        after, _ = write_values(self.outputs, self.calls.working, end)
        aliases = shares_memory(tensors_of(self.last), tensors_of(self.calls.working))
        return {"event": "ran", "outputs": outputs, "inputs": after, "aliases": aliases, "previous": None}

    def _require_plain(self, result: Any) -> None:
        if Guard.PLAIN not in self.guards_off:
            _require_plain(result)

    def profile(self, tool: str, inputs: Any) -> dict[str, object]:
        """A few calls on one set of inputs under a tool that works in this process."""
        arguments = read_values(self.inputs, inputs, self.device)
        return profile_call(tool, lambda: self.model(*arguments), self.device)

    def answer(self, message: dict[str, Any], fds: list[int]) -> dict[str, object]:
        op = message["op"]
        if op == "open":
            return self.open(fds, message["sizes"])
        if op == "construct":
            return self.construct(message["init"], message["seed"])
        if op == "weights":
            return self.take_weights(message["weights"])
        if op == "run":
            return self.run(message["inputs"])
        if op == "stage":
            return self.stage(message["inputs"])
        if op == "time":
            return self.time(message["sequence"], message["moved"])
        if op == "profile":
            return self.profile(message["tool"], message["inputs"])
        if op == "warm_calls":
            return self.warm_calls()
        if op == "graph":
            return self.graph()
        return self.show()


def _require_plain(result: Any) -> None:
    """Raises NotPlain."""

    def check(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise NotPlain(f"it returns a {type(tensor).__name__}, not a plain tensor")
        return tensor

    map_tensors(result, check)


def main(
    channel: Channel,
    candidate: Candidate,
    device: str,
    regions: tuple[int, ...],
    source_bytes: int,
    guards_off: frozenset[Guard] = frozenset(),
) -> None:
    """Serve until the supervisor closes the channel or the candidate fails."""
    send, receive = channel.send, channel.recv_fds
    fault = static_check(candidate.source, source_bytes, imports=Guard.IMPORTS not in guards_off)
    if fault:
        send({"event": "error", "kind": str(fault.status), "text": fault.reason, "line": fault.reason})
        return
    try:
        subject = Subject(channel, candidate, device, regions, guards_off)
        subject.load()
        send({"event": "imported"})
        with torch.no_grad():
            while True:
                message, fds = receive(2)
                if message is None:
                    return
                send(subject.answer(message, fds))
    except RegionFull:
        line = "its results are far larger than the reference's"
        send({"event": "error", "kind": "wrong", "text": line, "line": line})
    except (NotPlain, Cheat) as error:
        send({"event": "error", "kind": "rejected", "text": str(error), "line": str(error)})
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the candidate may raise anything
        text = clip("".join(traceback.format_exception(error)))
        send({"event": "error", "kind": "raised", "text": text, "line": f"{type(error).__name__}: {error}"[:400]})

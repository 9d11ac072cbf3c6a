"""The judge: a process that runs the reference, makes the inputs and compares; a candidate never shares it.

It lives as long as its task is in use on its worker, so that the reference is imported and constructed once.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .base import Task
from .clock import clock_for
from .compare import difference, same_bits
from .modules import TimedCalls, construct, load_module, shares_memory
from .tensors import LayoutError, map_tensors, read_values, tensors_of, write_values
from .wire import Channel, clip


class Slot(NamedTuple):
    """One set of inputs with what the reference makes of it."""

    inputs: list[Any]
    expected: Any
    mutates: bool
    aliases: bool


class Judge:
    """Answers the supervisor's messages; see the methods named after their op."""

    def __init__(self, channel: Channel, task: Task, device: str, seed: int) -> None:
        self.channel, self.task, self.device, self.seed = channel, task, device, seed
        self.slots: dict[int, Slot] = {}
        self.calls: TimedCalls | None = None
        self.last_result: Any = None
        self.inputs_fd = self.outputs_fd = -1
        self.next_offset = 0

    def load(self) -> None:
        """Raises what the task's module raises, ValueError when it lacks a name."""
        module = load_module(self.task.source, "task", Path.cwd())
        for name in ("Model", "get_inputs", "get_init_inputs"):
            if not callable(getattr(module, name, None)):
                raise ValueError(f"the task defines no {name}")
        self.module = module
        self.init_inputs = list(module.get_init_inputs())
        self.model = construct(module, "Model", self.init_inputs, self.seed, self.device)
        self.clock = clock_for(self.device)

    def begin(self) -> dict[str, object]:
        """A new candidate: fresh regions; construction arguments and weights are laid out for it."""
        self.slots.clear()
        self.calls = self.last_result = None
        init, end = write_values(self.inputs_fd, self.init_inputs)
        state = dict(self.model.state_dict()) if isinstance(self.model, torch.nn.Module) else {}
        weights, self.next_offset = write_values(self.inputs_fd, state, end)
        return {"event": "begun", "init": init, "weights": weights, "seed": self.seed}

    def prepare(self, slot: int, seed: int) -> dict[str, object]:
        """Inputs under a seed, laid out for the candidate, and the reference's results, kept here."""
        torch.manual_seed(seed)
        inputs = list(self.module.get_inputs())
        layout, self.next_offset = write_values(self.inputs_fd, inputs, self.next_offset)
        kept = map_tensors(inputs, lambda tensor: tensor.to(self.device))
        given = map_tensors(kept, torch.clone)
        expected = self.model(*given)
        self.clock.settle()
        outputs = tensors_of(expected)
        if not outputs:
            raise ValueError("the reference returns no tensor")
        aliases = shares_memory(outputs, tensors_of(given))
        mutates = not same_bits(given, kept)
        self.slots[slot] = Slot(kept, map_tensors(expected, torch.clone) if aliases else expected, mutates, aliases)
        return {"event": "prepared", "inputs": layout}

    def compare(self, slot: int, outputs: Any, inputs: Any, aliases: bool, previous: Any) -> dict[str, object]:
        """status ok, wrong or rejected, with the reason. previous: the result before, laid out again."""
        known = self.slots[slot]
        try:
            result = read_values(self.outputs_fd, outputs, self.device)
            wrong = difference(result, known.expected)
            if wrong:
                return _compared("wrong", wrong.reason)
            if aliases and not known.aliases:
                return _compared("rejected", "its output shares memory with an input")
            if not known.mutates and not same_bits(read_values(self.outputs_fd, inputs, self.device), known.inputs):
                return _compared("rejected", "it changes its inputs")
            if previous is not None and not same_bits(
                read_values(self.outputs_fd, previous, self.device), self.last_result
            ):
                return _compared("rejected", "a result is overwritten by the next call")
            self.last_result = result
        except LayoutError as error:
            return _compared("rejected", f"forged result: {error}")
        return _compared("ok", "")

    def time(self, sequence: list[int]) -> dict[str, object]:
        """Times of the reference in ns on the slots of sequence."""
        if self.calls is None:
            self.calls = TimedCalls(self.model, {slot: self.slots[slot].inputs for slot in set(sequence)}, self.clock)
            self.calls.run(sequence[:1], self.model)
        self.calls.sources.update({slot: self.slots[slot].inputs for slot in sequence})
        times, _ = self.calls.run(sequence, self.model)
        return {"event": "timed", "ns": times}

    def probe(self) -> dict[str, object]:
        """Is the task usable: finite, and the same twice for the same inputs?"""
        self.prepare(0, self.seed)
        slot = self.slots[0]
        tensors = [tensor for tensor in tensors_of(slot.expected) if tensor.is_floating_point()]
        if any(bool(torch.isnan(tensor).any()) for tensor in tensors):
            return {"event": "probed", "error": "the reference's results contain NaN"}
        again = self.model(*map_tensors(slot.inputs, torch.clone))
        wrong = difference(again, slot.expected)
        error = f"the reference differs between two calls on the same inputs: {wrong.reason}" if wrong else ""
        return {"event": "probed", "error": error}

    def answer(self, message: dict[str, Any], fds: list[int]) -> dict[str, object]:
        op = message["op"]
        if op == "begin":
            self.inputs_fd, self.outputs_fd = fds
            return self.begin()
        if op == "prepare":
            return self.prepare(message["slot"], message["seed"])
        if op == "compare":
            keys = ("slot", "outputs", "inputs", "aliases", "previous")
            return self.compare(*(message[key] for key in keys))
        if op == "time":
            return self.time(message["sequence"])
        if op == "probe":
            return self.probe()
        raise ValueError(f"unknown op {op!r}")


def _compared(status: str, reason: str) -> dict[str, object]:
    return {"event": "compared", "status": status, "reason": reason}


def main(channel: Channel, task: Task, device: str, seed: int) -> None:
    """Serve until the supervisor closes the channel."""
    judge = Judge(channel, task, device, seed)
    try:
        judge.load()
        channel.send({"event": "ready"})
        with torch.no_grad():
            while True:
                message, fds = channel.recv_fds(2)
                if message is None:
                    return
                if fds:
                    _close(judge.inputs_fd, judge.outputs_fd)
                channel.send(judge.answer(message, fds))
    except BaseException as error:  # the task's module may raise anything, SystemExit too
        text = "".join(traceback.format_exception(error))
        channel.send({"event": "error", "text": clip(text), "line": f"{type(error).__name__}: {error}"[:400]})


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)

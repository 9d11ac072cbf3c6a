"""The judge: a process that runs the reference, makes the inputs and compares; a candidate never shares it.

It lives as long as its task is in use on its worker, so that the reference is imported and constructed once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .base import Task
from .clock import clock_for, warm_times
from .compare import Difference, difference, largest_errors, same_bits
from .gpumemory import GpuRegion
from .guards import Guard, parse_guards
from .modules import PLACED_BYTES, PLACES, TimedCalls, construct, load_module, shares_memory
from .profile.device import device_facts
from .profile.work import work_of
from .tasks import files as task_files
from .tensors import LayoutError, map_tensors, read_values, tensors_of, write_values
from .wire import Channel, clip

OUTPUT_ROOM = 6
"""The results' region on a GPU, in results of the reference: one, the one before it, and wider types than asked."""
ROOM_BYTES = 4 << 20
HEADROOM_BYTES = 2 << 30
"""A context, what flushes the L2, and a candidate's own workspace."""


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
        self.on_gpu = device.startswith("cuda")
        self.inputs_on = device
        self.placed = False
        self.counted: dict[str, int] = {}
        self.guards_off: frozenset[Guard] = frozenset()
        self.inputs: int | GpuRegion = -1
        self.outputs: int | GpuRegion = -1
        self.next_offset = 0

    def load(self) -> dict[str, object]:
        """Import the task. Says what ModelNew is constructed with, so that it can be while build() goes on here.

        Arguments with tensors come by region, with begin(): init is None then.
        Raises what the task's module raises, ValueError when it lacks a name.
        """
        module = load_module(self.task.source, "task", Path.cwd())
        for name in ("Model", "get_inputs", "get_init_inputs"):
            if not callable(getattr(module, name, None)):
                raise ValueError(f"the task defines no {name}")
        self.module = module
        self.init_inputs = list(module.get_init_inputs())
        plain = not tensors_of(self.init_inputs)
        return {"event": "loaded", "init": write_values(-1, self.init_inputs)[0] if plain else None, "seed": self.seed}

    def build(self) -> dict[str, object]:
        self.model = construct(self.module, "Model", self.init_inputs, self.seed, "cpu")
        return {"event": "built"}

    def place(self) -> None:
        """Move the model to its device: the first use of a GPU, so not before this process has its turn on it."""
        self.clock = clock_for(self.device)
        if isinstance(self.model, torch.nn.Module):
            self.model = self.model.to(self.device)
        if self.on_gpu:
            self.input_bytes = self.output_bytes = 0
            for case in range(self.task.cases):
                inputs = self.make_inputs(self.seed, case)
                results = self.model(*map_tensors(inputs, lambda tensor: tensor.to(self.device)))
                self._difference(results, Slot(inputs, results, False, False))  # its kernels are loaded now, not later
                largest_errors(results, results)
                self.input_bytes = max(self.input_bytes, _bytes_of(inputs))
                self.output_bytes = max(self.output_bytes, _bytes_of(results))
                del inputs, results
            torch.cuda.empty_cache()  # until it is begun, it may wait for others who need the memory
        self.placed = True

    def warm_calls(self) -> dict[str, object]:
        """Times of the reference with its inputs in the L2 cache."""
        assert self.calls is not None
        working = self.calls.working
        return {"event": "timed", "ns": warm_times(self.device, lambda: self.model(*working))}

    def answer_place(self) -> dict[str, object]:
        """Ahead of the first candidate: context, weights, sizes."""
        if not self.placed:
            self.place()
        return {"event": "placed"}

    def room(self, sets: int) -> dict[str, object]:
        """Bytes of the GPU that are free, and that an evaluation needs here and in the candidate's process together."""
        free, _ = torch.cuda.mem_get_info(self.device)
        placed = 2 * PLACES * min(self.input_bytes, PLACED_BYTES)
        results = (OUTPUT_ROOM + 2 * sets) * self.output_bytes
        return {"event": "room", "free": free, "need": 3 * sets * self.input_bytes + placed + results + HEADROOM_BYTES}

    def begin(self, sets: int) -> dict[str, object]:
        """A new candidate: fresh regions; construction arguments and weights are laid out for it.

        sets: how many sets of inputs may be prepared for it. On a GPU the regions are made here and "sizes" says how
        large they are; else they came with the message.
        """
        self.release()
        if not self.placed:
            self.place()
        state = dict(self.model.state_dict()) if isinstance(self.model, torch.nn.Module) else {}
        sizes: list[int] = []
        if self.on_gpu:
            held = _bytes_of(self.init_inputs) + _bytes_of(state)
            self.inputs = GpuRegion.create(held + sets * self.input_bytes, self.device)
            self.outputs = GpuRegion.create(
                OUTPUT_ROOM * self.output_bytes + self.input_bytes + ROOM_BYTES, self.device
            )
            sizes = [self.inputs.size, self.outputs.size]
        init, end = write_values(self.inputs, self.init_inputs)
        weights, self.next_offset = write_values(self.inputs, state, end)
        return {"event": "begun", "init": init, "weights": weights, "seed": self.seed, "sizes": sizes}

    def release(self) -> dict[str, object]:
        """Drop everything that belonged to a candidate; on a GPU its memory goes back to the driver."""
        self.slots.clear()
        self.calls = self.last_result = None
        if self.on_gpu:
            for region in (self.inputs, self.outputs):
                if not isinstance(region, int):
                    region.close()
            self.inputs = self.outputs = -1
            if self.placed:
                torch.cuda.empty_cache()
                torch.zeros(1, device=self.device).add_(1)  # shows that the GPU still answers
                torch.cuda.synchronize(self.device)
        return {"event": "released"}

    def park(self) -> dict[str, object]:
        """Until the task's next candidate: of all that lies on the host, only the model is kept."""
        self.release()
        for region in (self.inputs, self.outputs):
            _close(region)
        self.inputs = self.outputs = -1
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # see worker_main.keep_freed_memory
        if trim is not None:
            trim(0)
        return {"event": "parked"}

    def make_inputs(self, seed: int, case: int = 0) -> list[Any]:
        """The task's inputs of a shape under a seed, made on the device; on the host where the task insists on it."""
        torch.manual_seed(seed)
        shape = (case,) if self.task.cases > 1 else ()
        if self.inputs_on == "cpu":
            return list(self.module.get_inputs(*shape))
        try:
            with torch.device(self.inputs_on):
                return list(self.module.get_inputs(*shape))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception:  # a generator of the host, a NumPy array ...: as the task was written
            self.inputs_on = "cpu"
            return self.make_inputs(seed, case)

    def prepare(self, slot: int, seed: int, case: int = 0) -> dict[str, object]:
        """Inputs under a seed, laid out for the candidate, and the reference's results, kept here."""
        inputs = self.make_inputs(seed, case)
        layout, self.next_offset = write_values(self.inputs, inputs, self.next_offset)
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
            result = read_values(self.outputs, outputs, self.device)
            wrong = self._difference(result, known)
            errors = largest_errors(result, known.expected)
            if wrong:
                return _compared("wrong", wrong.reason) | {"kind": wrong.kind} | errors
            if aliases and not known.aliases and Guard.ALIAS not in self.guards_off:
                return _compared("rejected", "its output shares memory with an input")
            watched = not known.mutates and Guard.MUTATION not in self.guards_off
            if watched and not same_bits(read_values(self.outputs, inputs, self.device), known.inputs):
                return _compared("rejected", "it changes its inputs")
            kept = previous is None or Guard.OVERWRITE in self.guards_off
            if not kept and not same_bits(read_values(self.outputs, previous, self.device), self.last_result):
                return _compared("rejected", "a result is overwritten by the next call")
            self.last_result = result
        except LayoutError as error:
            return _compared("rejected", f"forged result: {error}")
        return _compared("ok", "") | errors

    def _difference(self, result: Any, known: Slot) -> Difference | None:
        """By the task's own check_output(inputs, result, expected) -> text where it has one, else by dtype."""
        if Guard.VALUES in self.guards_off:
            return None
        check = getattr(self.module, "check_output", None)
        if check is None:
            return difference(result, known.expected)
        reason = str(check(map_tensors(known.inputs, torch.clone), result, known.expected) or "")
        return Difference("value", reason[:400]) if reason else None

    def work(self, slot: int, needed: bool, flops: bool) -> dict[str, object]:
        """What one call takes and gives (profile/work.py), and what the device says of itself."""
        known = self.slots[slot]
        counted = work_of(
            self.model, known.inputs, known.expected, known.aliases, needed=needed, flops=flops, cache=self.counted
        )
        return {"event": "work", "work": counted._asdict(), "facts": device_facts(self.device)._asdict()}

    def export(self, slot: int, fd: int) -> dict[str, object]:
        """Arguments, weights and inputs into a file, for a profiler's process."""
        state = dict(self.model.state_dict()) if isinstance(self.model, torch.nn.Module) else {}
        init, end = write_values(fd, self.init_inputs)
        weights, end = write_values(fd, state, end)
        inputs, _ = write_values(fd, self.slots[slot].inputs, end)
        os.close(fd)
        return {"event": "exported", "init": init, "weights": weights, "seed": self.seed, "inputs": inputs}

    def time(self, sequence: list[int], moved: bool) -> dict[str, object]:
        """Times of the reference in ns on the slots of sequence; moved: at another place in memory than before."""
        if self.calls is None:
            self.calls = TimedCalls(self.model, {slot: self.slots[slot].inputs for slot in set(sequence)}, self.clock)
            self.calls.run(sequence[:1], self.model)
        self.calls.sources.update({slot: self.slots[slot].inputs for slot in sequence})
        if moved:
            self.calls.move()
        times, _ = self.calls.run(sequence, self.model)
        late, behind = self.clock.take_late(), self.clock.take_behind()
        return {"event": "timed", "ns": times, "late": late, "behind": behind}

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

    def shared_fds(self) -> tuple[int, ...]:
        """Descriptors of the regions that were made here; the caller closes them."""
        return tuple(region.fd() for region in (self.inputs, self.outputs) if not isinstance(region, int))

    def answer(self, message: dict[str, Any], fds: list[int]) -> dict[str, object]:
        op = message["op"]
        if op == "begin":
            if fds:
                for region in (self.inputs, self.outputs):
                    _close(region)
                self.inputs, self.outputs = fds
            self.guards_off = parse_guards(message.get("guards_off", ()))
            return self.begin(message["sets"])
        if op == "release":
            return self.release()
        if op == "park":
            return self.park()
        if op == "room":
            return self.room(message["sets"])
        if op == "place":
            return self.answer_place()
        if op == "warm_calls":
            return self.warm_calls()
        if op == "prepare":
            return self.prepare(message["slot"], message["seed"], message["case"])
        if op == "compare":
            keys = ("slot", "outputs", "inputs", "aliases", "previous")
            return self.compare(*(message[key] for key in keys))
        if op == "time":
            return self.time(message["sequence"], message["moved"])
        if op == "work":
            return self.work(message["slot"], message["needed"], message["flops"])
        if op == "export":
            return self.export(message["slot"], fds[0])
        if op == "probe":
            return self.probe()
        raise ValueError(f"unknown op {op!r}")


def _compared(status: str, reason: str) -> dict[str, object]:
    return {"event": "compared", "status": status, "reason": reason}


def main(channel: Channel, task: Task, device: str, seed: int, files: dict[str, int]) -> None:
    """Serve until the supervisor closes the channel. files: descriptors of the task's files, open for reading."""
    task_files.given = files
    judge = Judge(channel, task, device, seed)
    try:
        for word in (judge.load, judge.build):
            channel.send(word())
        with torch.no_grad():
            while True:
                message, fds = channel.recv_fds(2)
                if message is None:
                    return
                answer = judge.answer(message, fds)
                shared = judge.shared_fds() if message["op"] == "begin" else ()
                channel.send(answer, shared)
                for fd in shared:
                    os.close(fd)
    except BaseException as error:  # the task's module may raise anything, SystemExit too
        text = "".join(traceback.format_exception(error))
        channel.send({"event": "error", "text": clip(text), "line": f"{type(error).__name__}: {error}"[:400]})


def _close(region: int | GpuRegion) -> None:
    if isinstance(region, int) and region >= 0:
        os.close(region)


def _bytes_of(value: Any) -> int:
    """What a nest takes in a region, at most."""
    return sum(tensor.numel() * tensor.element_size() + mmap.PAGESIZE for tensor in tensors_of(value)) + mmap.PAGESIZE

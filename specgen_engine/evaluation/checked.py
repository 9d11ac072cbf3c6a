"""Compile and check: from the text to a model whose results are right on inputs that it never saw."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from typing import Any

from .base import Candidate, Status, Task
from .buildcache import BuildFolder, remember_hang, remembered_hang
from .children import Child
from .gpulock import gpu_turn
from .gpuroom import Promise, note_shortage, promised
from .guards import Guard, parse_guards
from .spending import Spending
from .worker import WARM_S, Ended, Worker

TIMING_SLOTS = 2
GIVE_BACK_S, LOOK_AGAIN_S = 1.5, 0.05
"""For other workers to end what they keep on the GPU: the driver takes a while to end a context."""
ACQUITTALS = 4
LOADING, CONSTRUCTING = "loading the reference", "constructing ModelNew"


class Checked(Spending):
    """The first stages of one candidate on one worker; each raises Ended when it ends there.

    held: what is given back when the verdict has been told. crowded: the GPU's memory was too short before, so that
    this one has the GPU to itself from its first byte there. harmless: it was correct to the end, and no kernel of it
    can be running still.
    """

    crowded = harmless = False

    def __init__(self, worker: Worker, request: dict[str, Any], held: ExitStack) -> None:
        super().__init__(lambda stage: worker.link.send({"job": self.job, "stage": stage}), request.get("arrived"))
        self.held, self.turn, self.has_turn = held, ExitStack(), False
        self.imported_at, self.constructed = 0.0, False
        self.worker, self.limits, self.job = worker, worker.limits, str(request["job"])
        self.task = Task(**request["task"])
        self.candidate = Candidate(request["candidate"])
        self.off = worker.guards_off = parse_guards(request.get("guards_off", ()))
        self.checks = max(self.limits.check_seeds, self.task.cases)
        self.owed = self.checks + TIMING_SLOTS + 1
        self.sets = self.owed + ACQUITTALS
        self.lent = bool(request.get("lent"))  # the device's memory, to the KV tier
        self.shown: dict[str, Any] = {}
        self.layouts: dict[int, Any] = {}

    def _refuse_known_hang(self) -> None:
        cache, limits = self.worker.cache, self.limits
        reason = remembered_hang(cache, self.task.hash, self.candidate.hash) if limits.remember_hangs else None
        if reason is not None:
            raise Ended(Status.TIMEOUT, f"{reason} (when it ran before; not run again)")

    def note_hang(self, ended: Ended) -> None:
        """A call of the candidate that did not end: it is not to hold a GPU up again."""
        if ended.status is Status.TIMEOUT and self.worker.stage in ("check", "time") and self.limits.remember_hangs:
            remember_hang(self.worker.cache, self.task.hash, self.candidate.hash, str(ended))

    # -- compile ---------------------------------------------------------------------------------------------------

    def _compile(self, regions: tuple[int, ...], build: BuildFolder) -> None:
        """The judge loads the task and builds its model while the candidate is imported and constructed.

        On the host it prepares inputs meanwhile too; on a GPU it waits until the GPU is this evaluation's.
        """
        worker = self.worker
        worker.stage = "import"
        with self.step("fork"):
            self.child = worker.start_candidate(self.candidate, regions, build)
            self.judge = worker.judge_for(self.task)
        if worker.on_gpu:
            self._import_on_gpu()
            self._begin(())
        else:
            self._begin(regions)
            with self.own():
                self._imported()
        with self.step("inputs"):
            begun = self._judge_says("begun")
        self._open(begun["sizes"])
        if not self.constructed:
            self._construct(begun)
        with self.own():
            worker.ask(self.child, {"op": "weights", "weights": begun["weights"]})
            worker.reply(self.child, self.limits.compile_s, CONSTRUCTING)

    def _open(self, sizes: Any) -> None:
        """The candidate maps its tensors. A context of its own takes what the GPU's other processes make it take."""
        with self.step("open"):
            self.worker.ask(self.child, {"op": "open", "sizes": sizes}, tuple(self.judge.fds))
            self.judge.close_fds()
            self.worker.reply(self.child, max(self.limits.check_s, WARM_S), "making a CUDA context")

    def _imported(self) -> None:
        self.worker.reply(self.child, self.limits.compile_s, "importing the module")
        self.imported_at = self.child.heard
        self.worker.stage = "construct"

    def _construct(self, said: dict[str, Any]) -> None:
        with self.own():
            self.worker.ask(self.child, {"op": "construct", "init": said["init"], "seed": said["seed"]})
            self.worker.reply(self.child, self.limits.compile_s, CONSTRUCTING)
        self.constructed = True

    def _judge_says(self, event: str) -> dict[str, Any]:
        """The judge's message of this kind. A candidate that is imported before the model is built is constructed
        meanwhile; where its arguments are tensors, only once they are laid out for it."""
        said = self._judge_reply(LOADING)
        while said["event"] != event:
            if said["event"] == "loaded" and said["init"] is not None:
                sooner = {} if self.imported_at else self._judge_reply(LOADING, unless=self.child)
                if sooner:
                    said = sooner
                    continue
                self._construct_early(said)
            said = self._judge_reply(LOADING)
        return said

    def _construct_early(self, said: dict[str, Any]) -> None:
        """On a GPU within this evaluation's turn: a constructor may use it."""
        if self.worker.on_gpu:
            self._imported()
            self._take_gpu(self.turn)
            self._keep_turn(self.turn)
        self._construct(said)

    def _import_on_gpu(self) -> None:
        """While the module is imported, the judge gets its place on the GPU, in a turn of its own when that is long."""
        started, waited, own = time.monotonic(), self.waited_s, self.own_s
        try:
            if self.judge.pending:  # its import and construction on the host need no GPU
                self._judge_says("built")
            if not self.worker.judge_placed:
                self._place_judge()
            if not self.imported_at:
                self._imported()
            if not self.has_turn:
                self._take_gpu(self.turn)
                self._keep_turn(self.turn)
            self._take_room()
        finally:
            end = time.monotonic()
            self.own_s += max(0.0, (self.imported_at or self.child.heard or end) - started)
            unclaimed = end - started - (self.waited_s - waited) - (self.own_s - own)
            self.steps["reference"] = self.steps.get("reference", 0.0) + max(0.0, unclaimed)

    def _place_judge(self) -> None:
        """In a turn that is kept where the candidate is imported by then."""
        with ExitStack() as early:
            if not self.has_turn:
                self._take_gpu(early)
                if self.child.inbox or self.child.ended:
                    self._keep_turn(early)
            self.worker.ask(self.judge, {"op": "place"})
            self._judge_reply(LOADING)
            self.worker.judge_placed = True
            if not self.has_turn and (self.child.inbox or self.child.ended):
                self._keep_turn(early)

    def _begin(self, regions: tuple[int, ...]) -> None:
        self.judge.close_fds()
        begin = {"op": "begin", "sets": self.sets, "guards_off": sorted(self.off)}
        self.worker.ask(self.judge, begin, regions)
        for slot in range(self.owed):
            self._prepare(slot, slot % self.task.cases if slot < self.checks else 0)

    def _prepare(self, slot: int, case: int = 0) -> None:
        seed = 0 if Guard.SEEDS in self.off else secrets.randbits(48)
        self.worker.ask(self.judge, {"op": "prepare", "slot": slot, "seed": seed, "case": case})

    def _take_gpu(self, turn: ExitStack) -> None:
        """Wait for the GPU. Waiting counts as such from when the candidate could have gone on."""
        start = time.monotonic()
        self.gpu = turn.enter_context(gpu_turn(self.worker.device, self.worker.wait))
        if self.crowded:
            note_shortage(self.worker.device)
            self.gpu.alone()
        if self.child.inbox or self.child.ended or not self.child.pending:
            self.waited_s += max(0.0, time.monotonic() - max(start, self.child.heard))

    def _keep_turn(self, turn: ExitStack) -> None:
        """The turn is this evaluation's until its end; then nothing of it is left on the GPU."""
        if turn is not self.turn:
            self.turn.push(turn.pop_all())
        self.has_turn = True
        self.turn.callback(self._clear_gpu)
        self.worker.require_gpu()

    def _clear_gpu(self) -> None:
        """The next candidate's context takes the driver 0.2-0.3 s, in which others check where this one is harmless."""
        if self.harmless:
            self.gpu.beside_others(self.worker.pump)  # the verdict is told: nothing is left to cancel
        self.worker.clear_gpu()

    def _take_room(self) -> None:
        """Go on beside others where the GPU holds another evaluation of this kind too, else alone.

        Where even one lacks memory then, workers are asked for what they keep for later.
        """
        with self.gpu.looking():
            free, need = self._room()
            free -= promised(self.worker.device)
            beside = self.limits.parallel_checks and free > 2 * need
            if beside:
                self._promise(need)
        # If the GPU holds more than that, judges may wait there.
        self.worker.note_room(not self.lent and free > (2 + self.limits.judges) * need)
        if not beside:
            self.waited_s += self.gpu.alone()
            self._promise(need)
            self._ask_for_room(need)

    def _promise(self, need: int) -> None:
        self.turn.callback(Promise(self.worker.device, need).close)

    def _ask_for_room(self, need: int) -> None:
        """Where asking did not suffice before, it is not tried again: what others kept would be gone each time."""
        start, worker = time.monotonic(), self.worker
        free = self._room()[0]
        if free < need < worker.too_much:
            note_shortage(worker.device)
            while free < need and time.monotonic() < start + GIVE_BACK_S:
                worker.wait(LOOK_AGAIN_S)
                free = self._room()[0]
            if free < need:
                worker.too_much = need
        self.waited_s += time.monotonic() - start

    def _room(self) -> tuple[int, int]:
        """Bytes of the GPU that are free, and that this evaluation needs."""
        self.worker.ask(self.judge, {"op": "room", "sets": self.sets})
        answer = self._judge_reply(LOADING)
        return int(answer["free"]), int(answer["need"])

    def _judge_reply(self, doing: str, unless: Child | None = None) -> dict[str, Any]:
        return self.worker.reply(self.judge, self.limits.task_s, doing, unless=unless)

    def _layout(self, slot: int) -> Any:
        """The inputs of a slot; the judge answers in the order of slots."""
        with self.step("inputs"):
            while slot not in self.layouts:
                self.layouts[len(self.layouts)] = self._judge_reply("preparing inputs")["inputs"]
        return self.layouts[slot]

    # -- check -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self.worker.stage = "check"
        for slot in range(self.checks):
            self._check_slot(slot)

    def _check_hidden(self) -> None:
        if Guard.HIDDEN not in self.off:
            self._check_slot(self.checks + TIMING_SLOTS, " (on inputs kept back until after timing)")

    def _check_slot(self, slot: int, note: str = "") -> None:
        layout = self._layout(slot)
        with self.step("copies"):
            ran = self._run(layout)
        self._compare(slot, ran, note)

    def _run(self, layout: Any) -> dict[str, Any]:
        """One call on fresh inputs. Its own share is what its process says, at most what passed here."""
        start = time.monotonic()
        own: float | None = None
        try:
            self.worker.ask(self.child, {"op": "run", "inputs": layout})
            ran = self.worker.reply(self.child, self.limits.check_s, "running on fresh inputs")
            own = ran["took"] if isinstance(ran.get("took"), float) else None
        finally:
            passed = time.monotonic() - start
            self.own_s += passed if own is None else min(passed, max(0.0, own))
        return ran

    def _compare(self, slot: int, ran: dict[str, Any], note: str = "") -> None:
        self._layout(self.owed - 1)  # replies of the judge come in order: take those owed first
        keys = ("outputs", "inputs", "aliases", "previous")
        if ran.get("event") != "ran" or any(key not in ran for key in keys):
            raise Ended(Status.REJECTED, "forged message: not the answer that was asked for")
        with self.step("compare"):
            self.worker.ask(self.judge, {"op": "compare", "slot": slot} | {key: ran[key] for key in keys})
            found = self._judge_reply("comparing")
        self.shown = {key: found[key] for key in ("kind", "max_abs_error", "max_rel_error") if key in found}
        if found["status"] != "ok":
            status = Status.WRONG if found["status"] == "wrong" else Status.REJECTED
            raise Ended(status, found["reason"] + note, found["reason"])

"""A worker: a process with torch imported that forks judges and candidates, keeps the clock and never runs their code.

It talks to the pool over one socket of JSON lines (pool -> worker: evaluate, check_task, cancel, quiet; worker -> pool:
ready, stage, asks, verdict, task). When that socket closes, everything below it is killed and it exits.
"""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

from . import children, warm
from .base import Candidate, Status, Task
from .buildcache import BuildFolder, PreparedFolder, sweep
from .children import Child
from .gpulock import gpu_turn
from .gpuroom import last_shortage
from .guards import Guard
from .processes import TICK_S, Ended, Link, Lost, PoolGone, Processes
from .wire import Channel

__all__ = ["TICK_S", "Ended", "Link", "Lost", "PoolGone", "Worker"]
CANCEL_PATIENCE_S = 0.1
PROBE_S = 2.0
LOADING_REPLIES = 2
"""A judge's words of its own accord: loaded, built."""
QUIET_S = 2.0
"""A pool that has not answered by then cannot keep others' copies away; the timing says so."""
WARM_S = 30.0
IDLE_S = 0.25
"""How soon an idle worker notices that the GPU's memory is short."""
TRITON_DRIVER, TRITON_DRIVER_S = "triton-driver", 30.0


class Worker(Processes):
    """Judges, candidates and the spares that wait for them; what an evaluation consists of is in evaluate.py."""

    def judge_for(self, task: Task) -> Child:
        """The task's judge: one at hand, or a fresh one that still owes what it says while it loads."""
        if self.judge is not None and self.judge_key == task.hash and not self.judge.ended:
            while self.judge is not None and self.judge.pending:  # replies owed to a job that was cut off
                self.reply(self.judge, self.limits.task_s, "answering")
            if self.judge is not None:
                return self.judge
        before = self.judge, self.judge_key, self.judge_placed
        parked, placed = self.parked.get(task.hash, (None, False))
        if parked is not None:
            del self.parked[task.hash]
            self.judge, self.judge_key, self.judge_placed = parked, task.hash, placed
            self._park(*before)
            return self.judge_for(task)
        self.judge_placed = False
        self.judge = self._new_judge(task)
        self.judge.pending = LOADING_REPLIES
        self._park(*before)
        return self.judge

    def _park(self, judge: Child | None, key: str, placed: bool) -> None:
        """Keep the judge of the task before for that task's next candidate, or end it; end the one longest unused.

        They run nobody's code but their tasks': nothing waits for their ends.
        """
        if judge is not None and self.roomy and not judge.ended and judge.pending == len(judge.inbox):
            if not self.on_gpu:  # there it has given memory back at the end of its turn
                self.ask(judge, {"op": "park"})
            self.parked[key] = judge, placed
        else:
            self._silence(judge, patience_s=0.0)
        while len(self.parked) >= self.limits.judges:
            self._silence(next(iter(self.parked.values()))[0], patience_s=0.0)

    def note_room(self, roomy: bool) -> None:
        """Is there memory on the GPU for judges that wait? Those that do are ended when there is not."""
        self.roomy = roomy
        if not roomy:
            self.end_parked()

    def end_parked(self) -> None:
        """Their contexts take the driver a while to end: they are waited for with the candidate's."""
        for judge, _ in list(self.parked.values()):
            self._silence(judge, patience_s=0.0)

    def pump(self, seconds: float) -> None:
        super().pump(seconds)
        if self.on_gpu and (said := last_shortage(self.device)) != self.short_at:
            self.short_at = said
            self.end_parked()
            if not self.job and self.judge is not None:
                self._silence(self.judge, patience_s=0.0)

    def _new_judge(self, task: Task) -> Child:
        seed = int.from_bytes(os.urandom(6), "little")
        self.judge_key = task.hash
        if self.spare_judge is not None and self.spare_judge.warm and not (self.spare_judge.ended or task.files):
            judge, self.spare_judge = self.spare_judge, None
            (judge.scratch / warm.SOURCE).write_text(task.source, errors="surrogatepass")
            self.ask(judge, {"op": "judge", "name": task.name, "seed": seed})
            return judge
        device = self.device
        files = {name: os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in task.files if os.path.isfile(name)}

        def entry(channel: Channel) -> None:
            from . import judge

            judge.main(channel, task, device, seed, files)

        judge = self.fork("judge", entry, tuple(files.values()), {})
        for fd in files.values():
            os.close(fd)
        return judge

    def wait(self, seconds: float) -> None:
        """Between two tries for the GPU: live on. Raises Ended when the job at hand is cancelled."""
        self.heed_cancel()
        self.pump(seconds)

    def await_quiet(self) -> bool:
        """Ask the pool to keep KV copies off the device until the verdict; whether they had drained when it answered.

        Raises Ended when the job at hand is cancelled.
        """
        self.link.quiet.pop(self.job, None)
        self.link.send({"job": self.job, "asks": "quiet"})
        stop = time.monotonic() + QUIET_S
        while self.job not in self.link.quiet and time.monotonic() < stop:
            self.wait(TICK_S)
        return self.link.quiet.pop(self.job, False)

    def release_judge(self) -> None:
        """The judge gives back what it holds for a candidate; one that doesn't do so soon is ended.

        On a GPU its answer shows that the GPU still runs kernels.
        """
        judge = self.judge
        if judge is None or judge.ended:
            return
        patience = CANCEL_PATIENCE_S if self.job in self.link.cancelled else PROBE_S
        try:
            self.ask(judge, {"op": "release"})
            while judge.pending:
                self.reply(judge, patience, "giving memory back", heed_cancel=False)
        except Ended:
            self.end(self.judge)

    def start_candidate(self, candidate: Candidate, regions: tuple[int, ...], build: BuildFolder) -> Child:
        """The spare takes the candidate on where it was made for this build folder, else a fresh process does."""
        fits = self.spare is not None and self.spare_build is None and not self.spare.ended
        usable = fits and (build.moved or not build.hit)
        if usable and Guard.SANDBOX not in self.guards_off:
            child, self.spare = self.spare, None
        else:
            child = self._fork_waiting(build.path)
        assert child is not None
        self.regions, self.candidate = regions, child
        (child.scratch / warm.SOURCE).write_text(candidate.source, errors="surrogatepass")
        role = {"op": "candidate", "source_bytes": self.limits.source_bytes, "guards_off": sorted(self.guards_off)}
        self.ask(child, role, regions)
        return child

    def take_prepared(self) -> PreparedFolder | None:
        """The folder that the spare may write to, for the build of the candidate that it takes on."""
        if self.spare is None or self.spare.ended or Guard.SANDBOX in self.guards_off:
            return None
        folder, self.spare_build = self.spare_build, None
        return folder

    def _fork_waiting(self, build: Path) -> Child:
        device, base = self.device, self.triton_base
        extra = {"TORCH_EXTENSIONS_DIR": str(build / "torch"), "TRITON_CACHE_DIR": str(build / "triton")}
        child = self.fork("candidate", lambda channel: warm.main(channel, device, base), (), extra)
        child.warm = not self.on_gpu
        return child

    def renew_spare(self) -> None:
        """Have a process ready for the next candidate; on a GPU, where a context takes its time, for a task too."""
        if self.spare is not None and (self.spare.ended or self.spare_build is None):
            self.end(self.spare)
        if not self.limits.spares:
            return
        if self.spare is None:
            self.spare_build = self.spare_build or PreparedFolder(self.cache)
            self.spare = self._fork_waiting(self.spare_build.path)
        if self.on_gpu and (self.spare_judge is None or self.spare_judge.ended):
            self.end(self.spare_judge)
            device = self.device
            self.spare_judge = self.fork(
                "judge", lambda channel: warm.main(channel, device, None, compares=True), (), {}
            )

    def begin_warming(self) -> None:
        """The spares make their CUDA contexts; await_warm() waits for them. Only in this worker's turn on the GPU."""
        self.renew_spare()
        for spare in (self.spare, self.spare_judge):
            if spare is not None and not spare.warm and not spare.pending:
                self.ask(spare, {"op": "warm"})

    def await_warm(self, *, heed_cancel: bool = False) -> None:
        """Raises Ended only when the job at hand is cancelled and that is heeded; a spare that stays cold is ended."""
        for spare in (self.spare, self.spare_judge):
            if spare is not None and spare.pending:
                self.gpu_fault = self._warm_fault(spare, heed_cancel)
                spare.warm = not self.gpu_fault
                if self.gpu_fault:
                    self.end(spare)
                    return

    def _warm_fault(self, spare: Child, heed_cancel: bool) -> str:
        try:
            answer = self.reply(spare, WARM_S, "making a CUDA context", heed_cancel=heed_cancel)
            return str(answer.get("fault", ""))
        except Ended as ended:
            if ended.status is Status.CANCELLED:
                raise
            return ended.reason

    def clear_gpu(self) -> None:
        """The end of a turn on the GPU: nothing of the candidate is left there, and the GPU still answers.

        The judge shows it; one that did not answer is gone, and then a fresh context does.
        """
        self.begin_warming()
        self.bury_candidate()
        self.release_judge()
        if self.judge is None:
            self.end_parked()  # what this one met, they may have too
        if self.judge is None and self.limits.spares:
            self.end(self.spare)
            self.begin_warming()
        self.await_warm()

    def require_gpu(self) -> None:
        """In this worker's turn. Raises Ended when the GPU did not answer after the last turn and doesn't now."""
        if self.gpu_fault:
            self.begin_warming()
            self.await_warm(heed_cancel=True)
        if self.gpu_fault:
            reason = f"the GPU does not answer, for no fault of this candidate: {self.gpu_fault}"
            raise Ended(Status.CRASH, reason)

    def prepare(self) -> None:
        """What the first candidate need not wait for."""
        sweep(self.cache)
        if self.on_gpu:
            self.triton_base = self._build_triton_driver()
        self.renew_spare()
        if self.on_gpu and self.spare is not None:
            with gpu_turn(self.device, self.pump):
                self.begin_warming()
                self.await_warm()

    def _build_triton_driver(self) -> Path | None:
        """Triton's own C module, compiled once for every candidate, by a process that runs nobody's code."""
        if importlib.util.find_spec("triton") is None:
            return None
        base = self.cache / TRITON_DRIVER
        base.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid == 0:
            children.die_with_parent()
            try:
                warm.load_triton_driver(base)
            finally:
                os._exit(0)
        children.exit_code(pid, wait_s=TRITON_DRIVER_S)
        return base

    def serve(self) -> None:
        """Answer the pool until it goes."""
        from .evaluate import check_task, evaluate

        try:
            self.prepare()
            self.link.send({"ready": True, "sandbox": self.level})
            while True:
                while self.link.requests:
                    request = self.link.requests.popleft()
                    self.job = request["job"]
                    if request["op"] == "check_task":
                        self.link.send(check_task(self, request))
                        self.bury_candidate()  # the judge of the task before; an evaluation does so itself
                    else:
                        evaluate(self, request)
                    self.link.cancelled.discard(self.job)
                    self.job = ""
                    self.renew_spare()
                self.pump(IDLE_S)
                self.bury_candidate()  # judges that were ended for want of memory
        except (PoolGone, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            parked = [judge for judge, _ in self.parked.values()]
            for child in (self.candidate, *self.dying, self.spare, self.spare_judge, self.judge, *parked):
                self.end(child)
            if self.spare_build is not None:
                self.spare_build.close(keep=False)
            if self.gpu_state is not None:
                self.gpu_state.close()

"""A mock engine and pool: a Session's surroundings as plain queues, driven by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from specgen_engine.config import SpecGenConfig
from specgen_engine.controller.controller import Budget, Controller
from specgen_engine.controller.engine import Output
from specgen_engine.controller.events import SessionOptions
from specgen_engine.controller.learning import Learner
from specgen_engine.controller.notes import ignore
from specgen_engine.controller.report import CandidateRecord, ForkRecord, SearchRecord, summary_of
from specgen_engine.controller.request import Plan
from specgen_engine.controller.session import Session
from specgen_engine.controller.thinking import STYLES
from specgen_engine.evaluation.base import Candidate, Stage, Status, Task, Verdict
from specgen_engine.observability.metrics import Metrics
from specgen_engine.protocol import TriggerFired

TASK = Task("class Model: pass\n", "toy")
PROMPT = [1, 2, 3]


def module(name: str) -> str:
    """A fork's answer that holds a distinct candidate."""
    return f"Faster.\n\n```python\nclass ModelNew:\n    name = {name!r}\n```\n"


def source(name: str) -> str:
    return f"class ModelNew:\n    name = {name!r}"


class FakeEngine:
    """One character is one token. The test pushes outputs; aborts end a stream as SGLang does."""

    def __init__(self) -> None:
        self.base: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self.forks: dict[str, asyncio.Queue[Output]] = {}
        self.sent: list[Any] = []
        self.aborted: list[str] = []
        self.gone = False
        self.rid = "base"

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def say(self, text: str, finish: dict[str, Any] | None = None) -> None:
        self.base.put_nowait(output(text, finish))

    async def generate_base(self) -> AsyncIterator[Output]:
        while True:
            item = await self.base.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish:
                return

    async def generate_fork(self, rid: str, ids: list[int], options: dict[str, Any]) -> AsyncIterator[Output]:
        queue = self.forks[rid] = asyncio.Queue()
        self.last_fork = (rid, ids, options)
        while True:
            item = await queue.get()
            yield item
            if item.finish:
                return

    def abort(self, rid: str) -> None:
        self.aborted.append(rid)
        ended = output("", {"type": "abort", "message": "aborted"})
        if rid in self.forks:
            self.forks[rid].put_nowait(ended)
        elif rid == self.rid:
            self.base.put_nowait(ended)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    async def client_gone(self) -> bool:
        return self.gone


def output(text: str, finish: dict[str, Any] | None = None) -> Output:
    meta = {"finish_reason": finish, "completion_tokens": len(text), "cached_tokens": 7, "prompt_tokens": len(PROMPT)}
    return Output([ord(c) for c in text], text, meta)


class FakeJob:
    def __init__(self, search: str, candidate: Candidate, fork: int = 0) -> None:
        self.fork = fork
        self.id, self.search, self.candidate = candidate.hash, search, candidate
        self.result: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

    async def events(self) -> AsyncIterator[Stage]:
        for stage in (Stage.QUEUED, Stage.COMPILE):
            yield stage

    async def verdict(self) -> Verdict:
        return await self.result

    def cancel(self) -> None:
        if not self.result.done():
            self.result.set_result(Verdict(self.candidate.hash, Status.CANCELLED))


class FakePool:
    """The test gives verdicts by candidate name."""

    def __init__(self, problem: str | None = None) -> None:
        self.jobs: dict[str, FakeJob] = {}
        self.profiles: dict[str, FakeJob] = {}
        self.asked: list[dict[str, object]] = []
        self.problem = problem
        self.queued = 0
        self.checked = asyncio.Event()
        self.checked.set()

    async def check_task(self, task: Task) -> str | None:
        await self.checked.wait()
        return self.problem

    def submit(
        self, task: Task, candidate: Candidate, *, search: str, priority: float = 0, deadline: Any = None,
        fork: int = 0, stage: str = "evaluate", options: Any = None,
    ) -> FakeJob:  # fmt: skip
        jobs = self.jobs if stage == "evaluate" else self.profiles
        assert candidate.hash not in jobs, "a candidate was submitted twice"
        job = jobs[candidate.hash] = FakeJob(search, candidate, fork)
        if stage != "evaluate":
            self.asked.append(dict(options))
        return job

    def profile(self, name: str, text: str) -> None:
        candidate = Candidate(source(name)).hash
        told = Verdict(candidate, Status.CORRECT, speedup=1.0, stages={Stage.PROFILE: 2.0}, profile={"text": text})
        self.profiles[candidate].result.set_result(told)

    def snapshot(self) -> dict[str, object]:
        return {"ready": 1, "queued": self.queued}

    def judge(self, name: str, speedup: float | None, status: Status | None = None, digest: str = "") -> None:
        status = status or (Status.CORRECT if speedup else Status.WRONG)
        candidate = Candidate(source(name)).hash
        self.jobs[candidate].result.set_result(Verdict(candidate, status, speedup=speedup, digest=digest))

    def cancel_search(self, search: str) -> int:
        every = (*self.jobs.values(), *self.profiles.values())
        running = [job for job in every if not job.result.done() and job.search == search]
        for job in running:
            job.cancel()
        return len(running)


class Rig:
    """A session with its fakes, and what the client has got."""

    def __init__(
        self, *, streaming: bool = False, named: bool = True, termination: str = "speedup:1.5", **options: Any
    ) -> None:
        self.engine, self.pool, self.budget = FakeEngine(), FakePool(options.pop("problem", None)), Budget(4)
        feedback = options.pop("feedback", False)
        repeats = options.pop("end_repeats", None)
        plan = Plan(
            TASK, named, "every:10", termination, "Now: ", 0.7, 64, feedback=feedback, end_repeats=repeats
        )  # fmt: skip
        settings = SessionOptions(
            style=STYLES["qwen3"], opened=True, streaming=streaming, per_search=options.pop("per_search", 2),
            grace_s=options.pop("grace_s", 5), page_size=1, prompt_ids=PROMPT, profile=options.pop("profile", "off"),
        )  # fmt: skip
        publish = options.pop("publish", ignore)
        self.learner = Learner("toy")
        self.session = Session(
            "base",
            plan,
            settings,
            self.engine,
            self.pool,
            self.budget,
            None,
            publish,
            self.learner,  # type: ignore[arg-type]
        )
        self.got: list[Output] = []
        self.client = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for item in self.session.outputs():
            self.got.append(item)

    def trigger(self, reasoning_tokens: int, spec: str = "every:10") -> None:
        length = len(PROMPT) + reasoning_tokens
        self.session.notify(
            TriggerFired(
                rid="base", trigger=spec, length=length, reasoning_tokens=reasoning_tokens, inserted=length - 1
            )
        )

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    def fork(self, number: int, answer: str, finish: str = "stop") -> None:
        self.engine.forks[f"specgen-fork.base.{number}"].put_nowait(output(answer, {"type": finish}))

    async def fork_one(self, name: str) -> None:
        """A base that reasons, and its first fork's candidate in the pool."""
        self.engine.say("reasoning on")
        self.trigger(10)
        await self.settle()
        self.fork(1, module(name))
        await self.settle()

    async def end_quietly(self) -> None:
        """However the search stands, the client goes."""
        self.session.close()
        await self.end()

    async def end(self) -> None:
        try:
            await asyncio.wait_for(self.client, 5)
        finally:
            task = self.session.close()
            if task is not None:
                await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)


def fake_manager(**server: Any) -> Any:
    """What a Controller reads of SGLang's TokenizerManager."""
    arguments = {
        "model_path": "models/toy",
        "reasoning_parser": "qwen3",
        "host": "127.0.0.1",
        "api_key": None,
        "enable_trace": False,
        "dp_size": 1,
    }
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**arguments, "page_size": 1, **server}),
        tokenizer=SimpleNamespace(chat_template=None),
        rid_to_state={},
    )


class IdlePool(FakePool):
    """A pool that the HTTP routes only look at."""

    async def start(self) -> None:
        pass

    def snapshot(self) -> dict[str, object]:
        return {"device": "cpu", "workers": 1, "ready": 1, "busy": 0, "queued": 0, "finished": {}, "sandbox": ""}


def fake_controller(settings: SpecGenConfig | None = None, **server: Any) -> Controller:
    """A Controller on a fake manager and pool, with metrics of its own."""
    metrics = Metrics(CollectorRegistry())
    return Controller(fake_manager(**server), settings or SpecGenConfig(), lambda *_: IdlePool(), metrics)  # type: ignore[arg-type,return-value]


def ended_record(name: str = "a") -> SearchRecord:
    """A whole record: one fork, one correct candidate that was accepted."""
    record = SearchRecord(
        id=name, task="toy", task_hash="0" * 16, trigger="every:10", termination="correct", created=1.0, named=True,
        state="ended", ended_by="criterion", reason="correct", wall_s=3.0, reasoning_s=3.0, reasoning_tokens=30,
    )  # fmt: skip
    record.forks.append(ForkRecord(1, "every:10", 10, 3, 14, 1.0, finished_s=2.0, candidate="c" * 16, state="stop"))
    record.candidates.append(
        CandidateRecord(
            "c" * 16,
            "fork",
            2.0,
            forks=[1],
            status=Status.CORRECT,
            speedup=2.0,
            interval=(1.9, 2.1),
            verdict_s=3.0,
            stages={"queued": 0.1, "compile": 0.2, "check": 0.3, "time": 0.4},
        )
    )
    record.accepted = record.best = summary_of(record.candidates[0])
    return record

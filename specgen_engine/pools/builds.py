"""Builds of C++ candidates in a live pool: which jobs have one, and what builders say of them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from ..evaluation.base import Stage
from ..evaluation.candidates.forms import detect_form
from .base import Builds, Built, JobStage, Work
from .job import Order, PoolJob
from .policy_state import PoolState

if TYPE_CHECKING:
    from ..evaluation.base import Candidate

BUILD_OP = "build"
_LONG = frozenset({"cuda_inline", "cpp_inline", "cuda", "cpp"})
_SIGNS = ("load_inline", "cpp_extension", "__global__", 'extern "C"', '"sources"')
"""A text without any of them is not parsed."""


def build_kind(candidate: Candidate | None) -> str:
    """The kind of a candidate's C++ build, as its form names it; "" for none, or where the text hides it."""
    if candidate is None or not any(sign in candidate.source for sign in _SIGNS):
        return ""
    language = detect_form(candidate.source).rpartition("/")[2]
    return language if language in _LONG else ""


class BuildDesk:
    """A pool's side of its builders; a backend or a policy without them makes it do nothing."""

    def __init__(self, state: Any, backend: Any) -> None:
        self.state = state if isinstance(state, PoolState) else None
        self.builders = cast(Builds, backend) if hasattr(backend, "build_slots") else None

    def kind(self, order: Order) -> str:
        """Of a job that is submitted. With a guard off it is built as it is judged: in the slot."""
        if self.state is None or order.stage is JobStage.CHECK_TASK or (order.options or {}).get("guards_off"):
            return ""
        return build_kind(order.candidate)

    def begin(self, job: PoolJob) -> None:
        assert self.builders is not None
        job.build_began = time.monotonic()
        job.advance(Stage.COMPILE)
        self.builders.build(Work(job.id, 0, BUILD_OP, job.order.task, job.order.candidate))

    def cancel(self, job: PoolJob) -> None:
        """Kill its build, if one runs; the place is free once it has ended."""
        if job.build_began is not None and self.builders is not None:
            self.builders.cancel_build(job.id)

    def done(self, job: PoolJob | None, event: Built) -> bool:
        """Whether the job goes on: not when it was cancelled meanwhile."""
        assert self.state is not None
        took = time.monotonic() - job.build_began if job is not None and job.build_began is not None else 0.0
        if self.state.built(event.job, took if event.learnt else None) is None or job is None:
            return False
        job.build_began = None
        job.built_s += took
        return True

    def lost(self, jobs: Iterable[PoolJob]) -> None:
        """There are no builders any more."""
        if self.state is not None:
            self.state.lose_builders()
        for job in jobs:
            if job.build_began is not None:
                job.build_began = None

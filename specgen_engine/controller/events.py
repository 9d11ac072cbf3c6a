"""The words of a Session: its states, its events, and what it asks of its surroundings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

from specgen_engine.controller.engine import Output
from specgen_engine.controller.report import CandidateRecord, ForkRecord
from specgen_engine.controller.thinking import ThinkingStyle
from specgen_engine.evaluation.base import Verdict

Source = Literal["fork", "base", "draft"]


class State(StrEnum):
    PREPARING = "preparing"
    REASONING = "reasoning"
    ANSWERING = "answering"
    COMPETING = "competing"
    ENDED = "ended"


class ForkBudget(Protocol):
    """Forks in flight on the whole server."""

    def take(self, search: str) -> bool: ...
    def give_back(self, search: str) -> None: ...
    @property
    def in_flight(self) -> int: ...


class Script(Protocol):
    """A recorded iteration that this search replays (replay.book.Recording)."""

    @property
    def trace(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def reasoning_tokens(self) -> int: ...

    def base_ids(self, opened: bool) -> list[int]: ...
    def fork_ids(self, at_token: int) -> tuple[str | None, list[int]]: ...


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What does not change while the session runs. profile: the tool by which correct candidates are profiled."""

    style: ThinkingStyle
    opened: bool
    streaming: bool
    per_search: int
    grace_s: float
    page_size: int
    prompt_ids: list[int]
    profile: str = "off"


class Sent(NamedTuple):
    """Characters and ids that the client has already got."""

    text: int = 0
    ids: int = 0


class BaseOutput(NamedTuple):
    output: Output


class BaseFailed(NamedTuple):
    error: BaseException


class TaskChecked(NamedTuple):
    problem: str | None


class ForkDone(NamedTuple):
    record: ForkRecord
    output: Output | None
    error: str


class VerdictIn(NamedTuple):
    record: CandidateRecord
    verdict: Verdict


class GraceOver(NamedTuple):
    pass

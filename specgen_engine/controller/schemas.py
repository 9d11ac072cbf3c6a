"""What /specgen/* answers, for its OpenAPI description; a test holds the records against these models."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from specgen_engine.controller.report import CandidateRecord, ForkRecord

Chosen = dict[str, Any]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SearchFields(Closed):
    """Of one search. Times are seconds from its start, tokens are counts; ended_by is null while it runs."""

    id: str
    task: str
    task_hash: str
    trigger: str
    termination: str
    created: float = Field(description="seconds since the epoch")
    named: bool
    trace: str | None
    iteration: int | None
    state: str = Field(description="preparing, reasoning, answering, competing or ended")
    prompt_tokens: int
    reasoning_tokens: int
    recorded_reasoning_tokens: int | None
    answer_tokens: int
    fork_tokens: int
    forks_skipped: int
    ended_by: str | None = Field(description="criterion, reasoning, budget, cancelled or error")
    reason: str
    reasoning_s: float | None
    wall_s: float | None
    evaluation_s: float
    accepted: Chosen | None
    best: Chosen | None
    final: Chosen | None
    warning: str
    tokens: dict[str, int]
    seconds: dict[str, float | None]


class SearchRow(SearchFields):
    forks: int = Field(description="how many")
    candidates: int = Field(description="how many distinct ones")


class Searches(Closed):
    searches: list[SearchRow]
    pool: dict[str, Any]
    prompt_tasks_refused: str = Field(description="why no tasks are taken from prompts; empty when they may be")


class Ids(Closed):
    base: list[int]
    forks: list[dict[str, Any]]


class SearchView(SearchFields):
    forks: list[ForkRecord]
    candidates: list[CandidateRecord]
    ids: Ids | None = None


class Forked(Closed):
    search: str
    length: int = Field(description="prompt and output tokens up to the fork point")


class Problem(BaseModel):
    """SGLang's shape of an error; a bare FastAPI application says {"detail": ...} instead."""

    message: str = ""

"""What /specgen/* answers, for its OpenAPI description: made from the records, so that it can't say something else."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from specgen_engine.controller.report import CandidateRecord, ForkRecord, SearchRecord

_LISTS = ("ids", "forks", "candidates")


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _of_a_search(name: str, doc: str, **more: Any) -> type[Closed]:
    """A model with the fields of a SearchRecord but its lists, what ``to_dict`` adds, and `more`."""
    hints = get_type_hints(SearchRecord)
    plain: dict[str, Any] = {one.name: (hints[one.name], ...) for one in fields(SearchRecord) if one.name not in _LISTS}
    added: dict[str, Any] = {
        "fork_tokens": (int, ...),
        "tokens": (dict[str, int], ...),
        "seconds": (dict[str, float | None], ...),
    }
    return create_model(name, __base__=Closed, __doc__=doc, **plain, **added, **more)


class Ids(Closed):
    base: list[int]
    forks: list[dict[str, Any]]


SearchRow = _of_a_search(
    "SearchRow",
    "One search; forks and candidates are counts. Seconds from its start; ended_by is null while it runs.",
    forks=(int, ...),
    candidates=(int, ...),
)
SearchView = _of_a_search(
    "SearchView",
    "One search whole. Seconds from its start; ended_by is null while it runs.",
    forks=(list[ForkRecord], ...),
    candidates=(list[CandidateRecord], ...),
    ids=(Ids | None, None),
)


class Searches(Closed):
    searches: list[SearchRow]  # type: ignore[valid-type]
    pool: dict[str, Any]
    prompt_tasks_refused: str = Field(description="why no tasks are taken from prompts; empty when they may be")


class Forked(Closed):
    search: str
    length: int = Field(description="prompt and output tokens up to the fork point")


class Problem(BaseModel):
    """SGLang's shape of an error; a bare FastAPI application says {"detail": ...} instead."""

    message: str = ""

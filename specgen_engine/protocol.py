"""Messages between the controller (TokenizerManager) and the schedulers, over SGLang's own IPC.

| message      | from       | to         | answer        | handler                      |
|--------------|------------|------------|---------------|------------------------------|
| WatchSearch  | controller | schedulers | TriggerFired* | scheduler.extension.watch    |
| ForkPoint    | controller | schedulers | ForkPointDone | scheduler.extension.point    |
| ReplayScript | controller | schedulers | -             | replay.sampler.load          |
| EndSearch    | controller | schedulers | -             | scheduler.extension.end      |

Each carries the rid of the base request (ReplayScript: of the request it scripts) and, to schedulers, the data-parallel
replica that the search runs on (None on a server without any). Lengths count tokens of
prompt + output, so that every tensor-parallel rank acts on the same number.
"""

from __future__ import annotations

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types


class ToScheduler(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """Every replica gets it, and the one it names acts."""

    replica: int | None = None


class WatchSearch(ToScheduler, kw_only=True):  # type: ignore[call-arg]
    """Sent before the base request itself, on the same socket, so that no token is missed."""

    trigger: str
    open_mark: str
    close_mark: str
    opened: bool


class ForkPoint(ToScheduler, kw_only=True):  # type: ignore[call-arg]
    """Insert prompt + output [0, length) of a running request into the radix tree."""

    length: int


class ForkPointDone(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """inserted: tokens now in the tree; state: running | waiting | finished | unknown."""

    asked: int
    inserted: int
    state: str


class TriggerFired(BaseReq, kw_only=True):  # type: ignore[call-arg]
    """trigger fired at the token that made the request `length` tokens long (reasoning_tokens of them reasoning)."""

    trigger: str
    length: int
    reasoning_tokens: int
    inserted: int


class ReplayScript(ToScheduler, kw_only=True):  # type: ignore[call-arg]
    """Output ids that replace the sampled ones of one request, from its first output token on."""

    prompt_tokens: int
    ids: list[int]


class EndSearch(ToScheduler, kw_only=True):  # type: ignore[call-arg]
    """Forget what was watched for rid and the scripts of requests whose rid starts with `scripts`."""

    scripts: str


TO_SCHEDULER = (WatchSearch, ForkPoint, ReplayScript, EndSearch)
TO_CONTROLLER = (ForkPointDone, TriggerFired)


def register_messages() -> None:
    """Teach SGLang's decoder our types; call once in each process that sends or receives them."""
    hook_custom_types(*TO_SCHEDULER, *TO_CONTROLLER)


def fork_rid(search: str, number: int) -> str:
    """Never starts with the base's rid: SGLang aborts by rid prefix."""
    return f"specgen-fork.{search}.{number}"


def forks_of(search: str) -> str:
    """Prefix of every fork rid of a search."""
    return f"specgen-fork.{search}."


def is_fork(rid: str) -> bool:
    return rid.startswith("specgen-fork.")


def search_of(rid: str) -> str:
    """The search a fork rid belongs to."""
    return rid.split(".", 2)[1] if is_fork(rid) else rid

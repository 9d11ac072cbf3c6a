"""What a request may ask for in custom_params.specgen, validated before anything runs."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from specgen_engine.config import SpecGenConfig, TerminationSpec, TriggerSpec
from specgen_engine.controller.tasks_in_prompt import find_task
from specgen_engine.errors import RequestError
from specgen_engine.evaluation.base import Task

TASK_CHARS = 1 << 20


def _encodable(text: str) -> str:
    """Half a surrogate pair is no text: it would break hashing, tokenisation and every answer that repeats it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at character {error.start}; send UTF-8 text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class ForkOptions(BaseModel):
    """What is absent is the server's; an end_repeats that is null ends none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nudge: Text | None = Field(default=None, max_length=10_000)
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    end_repeats: float | None = Field(default=None, ge=0, le=1e6)


class RequestOptions(BaseModel):
    """custom_params.specgen: an object, or the same as a JSON string.

    task: the source of a reference module, or a path under one of the server's --specgen-tasks-roots.
    iteration: which recorded iteration a replaying server plays (default: the next one of the task).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Text | None = Field(default=None, max_length=TASK_CHARS)
    name: Text | None = Field(default=None, max_length=200)
    trigger: TriggerSpec | None = None
    termination: TerminationSpec | None = None
    fork: ForkOptions = ForkOptions()
    iteration: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A search as it will run: the request's options over the server's configuration.

    end_repeats: what a new kernel is worth where a fork may be ended as a repeat (repeats.worth_ending); None: none is.
    """

    task: Task
    named: bool
    trigger: str
    termination: str
    nudge: str
    temperature: float | None
    fork_tokens: int
    iteration: int | None = None
    feedback: bool = False
    end_repeats: float | None = None


def take_out(sampling_params: dict[str, Any] | None) -> Any:
    """Remove and return custom_params.specgen; a value nested in custom_params would break SGLang's own decoder."""
    if not sampling_params or not isinstance(sampling_params.get("custom_params"), dict):
        return None
    custom = dict(sampling_params["custom_params"])
    value = custom.pop("specgen", None)
    sampling_params["custom_params"] = custom or None
    return value


def parse_options(value: Any) -> RequestOptions | bool | None:
    """None: not named; False: opted out; else the options. Raises RequestError naming the field."""
    if value is None or value is False:
        return value
    if value is True:
        return RequestOptions()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError("", f"not JSON ({error!s:.200}); send an object, its JSON string, or false") from None
        if value is None or isinstance(value, bool):
            return parse_options(value)
    if not isinstance(value, dict):
        raise RequestError("", f"got {value!r:.80}; send an object, its JSON string, or false")
    try:
        return RequestOptions.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RequestError(
            f"{field:.100}".encode("utf-8", "backslashreplace").decode(), f"{first['msg']} (got {first['input']!r:.80})"
        ) from None


def plan_search(
    options: RequestOptions | None, prompt: str, config: SpecGenConfig, prompt_refused: str = ""
) -> Plan | None:
    """The search that a request asks for; None when it names none and its prompt holds no task we may take.

    prompt_refused: why none may be taken from a prompt (``trust``). Raises RequestError when the request named specgen
    and no task can be had.
    """
    source = _task_source(options, config) if options is not None and options.task is not None else None
    if source is None and not prompt_refused and (options is not None or config.tasks.source == "prompt"):
        source = find_task(prompt)
    if source is None:
        if options is None:
            return None
        raise RequestError(
            "task",
            f"missing, and {prompt_refused}"
            if prompt_refused
            else "missing, and no fenced module in the prompt defines Model, get_inputs and get_init_inputs",
        )
    asked = options or RequestOptions()
    fork = asked.fork
    return Plan(
        task=Task(source, asked.name or "task"),
        named=options is not None,
        trigger=asked.trigger or config.trigger,
        termination=asked.termination or config.termination,
        nudge=config.fork.nudge if fork.nudge is None else fork.nudge,
        temperature=config.fork.temperature if fork.temperature is None else fork.temperature,
        fork_tokens=min(fork.max_tokens or config.fork.max_tokens, config.fork.max_tokens),
        iteration=asked.iteration,
        feedback=config.fork.feedback,
        end_repeats=fork.end_repeats if "end_repeats" in fork.model_fields_set else config.fork.end_repeats,
    )


def _task_source(options: RequestOptions, config: SpecGenConfig) -> str:
    text = options.task or ""
    if "\n" in text:
        return text
    if not config.tasks.roots:
        raise RequestError(
            "task",
            f"{text!r:.200} looks like a path, and the server allows none (--specgen-tasks-roots); send the source",
        )
    try:
        path = Path(text).resolve()
        if not any(path.is_relative_to(root.resolve()) for root in config.tasks.roots):
            raise RequestError(
                "task", f"{text!r:.200} is outside the folders that the server allows; send the source instead"
            )
        return _read_task(path)
    except RequestError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(
            "task", f"{text!r:.200} cannot be read ({error.__class__.__name__}); send the source instead"
        ) from None


def _read_task(path: Path) -> str:
    """Text of a plain file of at most TASK_CHARS bytes; never waits, as opening a pipe would."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > TASK_CHARS:
            raise OSError("no plain file of at most 1 MiB")
        return file.read(TASK_CHARS).decode()

"""The OpenAI endpoint that an agent asks: ours, with forks and a report, or any other, without."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAIError

from specgen_engine.agent.base import AgentError, Generation
from specgen_engine.controller.thinking import CLOSE_MARK, without_thinking
from specgen_engine.evaluation.base import Task

POLL_S = 1.0
REQUEST_S = 3_600.0


@dataclass(frozen=True, slots=True)
class Asking:
    """How every iteration asks. trigger and termination go to our server; None leaves its own in force."""

    model: str
    max_tokens: int
    temperature: float | None = None
    trigger: str | None = None
    termination: str | None = None
    recorded: bool = False

    def __post_init__(self) -> None:
        if self.temperature is not None and not math.isfinite(self.temperature):
            raise AgentError(f"--temperature {self.temperature}: must be finite; leave it out for the endpoint's own")


Progress = Callable[[dict[str, Any]], None]


class Endpoint:
    """connect() finds out what it is; generate() asks it once. One instance serves several searches at once."""

    def __init__(self, base_url: str, api_key: str, asking: Asking) -> None:
        self.base_url, self.asking = base_url, asking
        self.client = AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=REQUEST_S, max_retries=2)
        parts = urlsplit(base_url)
        self._root = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        self._http = httpx.AsyncClient(headers={"Authorization": f"Bearer {api_key}"}, timeout=10)
        self.speculative = False

    async def connect(self) -> None:
        """Asks for the models and for /specgen. Raises AgentError naming --base-url or --model and the remedy."""
        try:
            models = [model.id async for model in self.client.models.list()]
        except APIStatusError as error:
            raise AgentError(f"--base-url {self.base_url}: answered {error.status_code}: {_short(error)}") from None
        except (APIConnectionError, OpenAIError, httpx.HTTPError) as error:
            raise AgentError(
                f"--base-url {self.base_url}: not reachable ({_short(error)}); start the server, or correct the address"
            ) from None
        if not self.asking.model:
            if not models:
                raise AgentError(f"--base-url {self.base_url}: serves no model; name one with --model")
            self.asking = replace(self.asking, model=models[0])
        # The one route that asks for no more than the API key: the list of searches is the administrator's.
        self.speculative = await self._get("/specgen/openapi.json") is not None

    async def generate(self, messages: Any, task: Task, rid: str, number: int, progress: Progress) -> Generation:
        """One answer. rid: the request's id, by which its progress is followed; number: of the iteration, from 1.

        Raises AgentError when the endpoint refuses, breaks off, or does not reason.
        """
        ask = self._ask_ours if self.speculative else self._ask_any
        started = time.monotonic()
        try:
            generation = await ask(messages, task, rid, number, progress)
        except APIStatusError as error:
            raise AgentError(f"--base-url {self.base_url}: answered {error.status_code}: {_short(error)}") from None
        except (OpenAIError, httpx.HTTPError) as error:
            raise AgentError(
                f"--base-url {self.base_url}: broke off ({_short(error)}); the history is kept: run the command again"
            ) from None
        if not generation.reasoned:
            raise AgentError(
                f"--base-url {self.base_url}: {self.asking.model} answered without reasoning; use a reasoning model, "
                "and start SGLang with --reasoning-parser"
            )
        return replace(generation, seconds=round(time.monotonic() - started, 4))

    async def close(self) -> None:
        await self._http.aclose()
        await self.client.close()

    # ---- ours: one plain request, watched by its id, since an answer that is not streamed can still be replaced

    async def _ask_ours(self, messages: Any, task: Task, rid: str, number: int, progress: Progress) -> Generation:
        asking = self.asking
        options: dict[str, Any] = {"task": task.source, "name": task.name}
        options |= {name: value for name in ("trigger", "termination") if (value := getattr(asking, name))}
        if asking.recorded:
            options["iteration"] = number
        body = {"custom_params": {"specgen": json.dumps(options)}, "rid": rid}
        watching = asyncio.create_task(self._watch(rid, progress))
        try:
            answer = await self.client.chat.completions.create(
                model=asking.model, messages=messages, max_tokens=asking.max_tokens, extra_body=body, **self._sampling()
            )  # type: ignore[call-overload]
        finally:
            watching.cancel()
        row = answer.model_dump()
        message, usage = row["choices"][0]["message"], row["usage"] or {}
        search = (row.get("sglext") or {}).get("specgen")
        return Generation(
            answer=without_thinking(message["content"] or ""),
            reasoned=_reasoned(message, usage),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            seconds=0.0,
            finish=row["choices"][0]["finish_reason"] or "stop",
            search=search,
        )

    async def _watch(self, rid: str, progress: Progress) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            row = await self._get(f"/specgen/searches/{rid}")
            if row is not None:
                verdicts = sum(candidate["status"] is not None for candidate in row["candidates"])
                best = (row["best"] or {}).get("speedup")
                progress({"state": row["state"], "forks": len(row["forks"]), "verdicts": verdicts, "best": best})

    async def _get(self, path: str) -> dict[str, Any] | None:
        """None where there is no such thing: another server, or a search that has not begun."""
        try:
            answer = await self._http.get(self._root + path)
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None

    # ---- any: streamed, so that there is something to show

    async def _ask_any(self, messages: Any, task: Task, rid: str, number: int, progress: Progress) -> Generation:
        stream = await self.client.chat.completions.create(
            model=self.asking.model, messages=messages, max_tokens=self.asking.max_tokens, stream=True,
            stream_options={"include_usage": True}, **self._sampling(),
        )  # type: ignore[call-overload]  # fmt: skip
        text, reasoning, pieces, finish = "", "", 0, "stop"
        usage: dict[str, Any] = {}
        async for chunk in stream:
            if chunk.usage is not None:
                usage = chunk.usage.model_dump()
            for choice in chunk.choices:
                delta = choice.delta.model_dump()
                reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
                text += delta.get("content") or ""
                finish = choice.finish_reason or finish
                pieces += 1
                progress({"state": "answering" if text else "reasoning", "tokens": pieces})
        return Generation(
            answer=without_thinking(text),
            reasoned=_reasoned({"content": text, "reasoning_content": reasoning}, usage),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens") or pieces,
            seconds=0.0,
            finish=finish,
        )

    def _sampling(self) -> dict[str, Any]:
        return {} if self.asking.temperature is None else {"temperature": self.asking.temperature}


def _reasoned(message: dict[str, Any], usage: dict[str, Any]) -> bool:
    """Reasoning shows as a field of its own, as tokens in the usage, or as marks in the text."""
    if message.get("reasoning_content") or message.get("reasoning"):
        return True
    details = usage.get("completion_tokens_details") or {}
    if details.get("reasoning_tokens") or usage.get("reasoning_tokens"):
        return True
    return CLOSE_MARK in (message.get("content") or "")


def _short(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause) or cause.__class__.__name__).splitlines()[0][:300]

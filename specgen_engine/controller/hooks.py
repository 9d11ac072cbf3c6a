"""Hook handlers of the server process; each is one line of plugin.HOOKS."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from pydantic import model_serializer
from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse, ChatCompletionStreamResponse, SglExt
from sglang.srt.managers.io_struct import GenerateReqInput

from specgen_engine.config import SpecGenConfig, flag_of
from specgen_engine.controller.controller import Controller
from specgen_engine.controller.http import add_routes
from specgen_engine.controller.ranks import gpus_of
from specgen_engine.controller.request import Plan, parse_options, plan_search, take_out
from specgen_engine.controller.triggers import parse_trigger, wanted_logprobs
from specgen_engine.errors import RequestError
from specgen_engine.protocol import ForkPointDone, TriggerFired, is_fork, register_messages

logger = logging.getLogger(__name__)
STRUCTURED = ("json_schema", "regex", "ebnf", "structural_tag")


@dataclass(frozen=True, slots=True)
class ChatNote:
    """What the controller must know of a chat request that its GenerateReqInput does not say."""

    tools: bool
    prompt: str


def attach(_result: None, manager: Any) -> None:
    """AFTER TokenizerManager.init_request_dispatcher."""
    from sglang.srt.entrypoints.http_server import app

    register_messages()
    require_pool(manager.server_args.__dict__["specgen"])
    controller = manager.specgen = Controller(manager, manager.server_args.__dict__["specgen"], make_pool)
    handlers: dict[type, Any] = {TriggerFired: controller.on_trigger, ForkPointDone: controller.on_point}
    manager._result_dispatcher._mapping.update(handlers)
    add_routes(app, controller)


RAY = "ray:"


def require_pool(settings: SpecGenConfig) -> None:
    """A shared pool must answer before the server is up, and nothing may be set that it would not heed.

    Raises PoolError naming the flag.
    """
    wanted = settings.evaluation
    if not wanted.device.startswith(RAY):
        return
    from specgen_engine.pools.ray_head import PoolError
    from specgen_engine.pools.ray_pool import require_answer

    if idle := sorted(wanted.model_fields_set - {"device", "pause"}):
        flags = ", ".join(flag_of(("evaluation", name)) for name in idle)
        raise PoolError(
            f"{flags}: a shared pool evaluates as its evaluators were started; leave it out beside "
            f"--specgen-evaluation-device {wanted.device} (`specgen evaluator` has --sandbox and --workers)"
        )
    require_answer(wanted.device.removeprefix(RAY), "--specgen-evaluation-device")


def make_pool(settings: SpecGenConfig, server_args: Any) -> Any:
    from specgen_engine.evaluation.limits import EvaluationLimits
    from specgen_engine.pools.local import LocalPool

    wanted = settings.evaluation
    if wanted.device.startswith(RAY):
        from specgen_engine.pools.ray_pool import RayPool

        return RayPool(wanted.device.removeprefix(RAY))
    limits = EvaluationLimits(
        compile_s=wanted.compile_s,
        check_s=wanted.check_s,
        time_s=wanted.time_s,
        task_s=wanted.task_s,
        memory_bytes=int(wanted.memory_gb * (1 << 30)),
        sandbox={"auto": "prefer"}.get(wanted.sandbox, wanted.sandbox),
    )
    device = _device(settings, server_args)
    if shared := devices_shared(device, server_args):
        logger.warning(
            "specgen: candidates are evaluated on %s, which the engine serves on: they get the memory that "
            "--mem-fraction-static %s leaves, and the engine stands still while they are timed "
            "(--specgen-evaluation-pause); --specgen-evaluation-device names another GPU",
            ",".join(shared), server_args.mem_fraction_static,
        )  # fmt: skip
    return LocalPool(workers=wanted.workers, device=device, limits=limits, cache=wanted.cache)


def devices_shared(device: str, server_args: Any) -> list[str]:
    """Those of the evaluators' GPUs (cuda:1,cuda:2) on which this server's own ranks run."""
    if server_args.device == "cpu":
        return []
    own = {f"cuda:{gpu}" for gpu in gpus_of(server_args)}
    return [name for name in device.split(",") if ("cuda:0" if name == "cuda" else name) in own]


def _device(settings: SpecGenConfig, server_args: Any) -> str:
    """auto: the CPU beside a CPU engine, else the first GPU behind the server's own, else the server's."""
    if settings.evaluation.device != "auto":
        return settings.evaluation.device
    if server_args.device == "cpu":
        return "cpu"
    import torch

    spare = gpus_of(server_args).stop
    return f"cuda:{spare if spare < torch.cuda.device_count() else server_args.base_gpu_id}"


def note_chat_request(result: tuple[Any, Any], serving: Any, request: Any, raw_request: Any = None) -> None:
    adapted, chat = result
    if isinstance(adapted, GenerateReqInput):
        adapted.specgen_chat = ChatNote(tools=bool(chat.tools), prompt=_user_text(chat.messages))


def _user_text(messages: list[Any]) -> str:
    parts: list[str] = []
    for message in messages:
        content = getattr(message, "content", None)
        if getattr(message, "role", None) != "user" or content is None:
            continue
        parts += [content] if isinstance(content, str) else [getattr(part, "text", "") or "" for part in content]
    return "\n\n".join(parts)


def generate_request(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """A search around an eligible request; every other one goes straight to SGLang."""
    if not isinstance(obj, GenerateReqInput) or (isinstance(obj.rid, str) and is_fork(obj.rid)):
        return original(manager, obj, request)
    value, named_in_batch = _take_out(obj)
    if value is None and not named_in_batch and not manager.specgen.reads_prompts:
        return original(manager, obj, request)
    return _maybe_search(original, manager, obj, request, value, named_in_batch)


def _take_out(obj: Any) -> tuple[Any, bool]:
    if isinstance(obj.sampling_params, list):
        return None, any(take_out(params) not in (None, False) for params in obj.sampling_params)
    return take_out(obj.sampling_params), False


async def _maybe_search(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any, value: Any, named_in_batch: bool
) -> AsyncIterator[Any]:
    controller: Controller = manager.specgen
    if named_in_batch:
        raise RequestError("", "not with a batch of prompts; send one chat request a search")
    options = parse_options(value)
    plan = None
    if options is not False:
        assert not isinstance(options, bool)
        reason = ineligible(obj)
        if reason and options is not None:
            raise RequestError("", f"not with {reason}")
        if reason:
            _served_without_forks(reason)
        else:
            plan = plan_search(options, obj.specgen_chat.prompt, controller.settings, controller.prompt_tasks_refused)
    if plan is None:
        async for out in original(manager, obj, request):
            yield out
        return
    async for out in _search(original, manager, obj, request, plan):
        yield out


@cache
def _served_without_forks(reason: str) -> None:
    """One warning a reason, however many requests it meets."""
    logger.warning("specgen: requests with %s are served without forks (docs/support.md)", reason)


async def _search(original: Any, manager: Any, obj: Any, request: Any, plan: Plan) -> AsyncIterator[Any]:
    streaming = bool(obj.stream)
    if top_k := wanted_logprobs(parse_trigger(plan.trigger)):
        obj.return_logprob, obj.top_logprobs_num, obj.logprob_start_len = True, top_k, -1
    prompt = obj.text if obj.text is not None else manager.tokenizer.decode(obj.input_ids)
    search = manager.specgen.search(original, obj, request, plan, prompt)
    try:
        async for out in search:
            if not streaming:
                _raise_abort(out["meta_info"].get("finish_reason"))
            yield out
    finally:
        await search.aclose()


def _raise_abort(finish: dict[str, Any] | None) -> None:
    """What SGLang raises to a client that does not stream; a search always streams inside."""
    if not finish or finish.get("type") != "abort":
        return
    status, message = finish.get("status_code"), finish.get("message", "aborted")
    if status == HTTPStatus.BAD_REQUEST:
        raise ValueError(message)
    if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INTERNAL_SERVER_ERROR):
        raise HTTPException(status_code=status, detail=message)


def ineligible(obj: Any) -> str | None:
    """Why a request cannot be a search, in words that follow "not with"; None when it can."""
    note = getattr(obj, "specgen_chat", None)
    params = obj.sampling_params or {}
    if note is None:
        return "this route; use /v1/chat/completions"
    if isinstance(obj.text, list) or (obj.input_ids and isinstance(obj.input_ids[0], list)):
        return "a batch of prompts"
    if params.get("n", 1) != 1:
        return "n above 1"
    checks = {
        "tools": note.tools,
        "logprobs": bool(obj.return_logprob),
        "structured output": any(params.get(name) for name in STRUCTURED),
        "images, video or audio": bool(obj.image_data or obj.video_data or obj.audio_data),
        "input embeddings": obj.input_embeds is not None,
        "hidden states": bool(obj.return_hidden_states),
        "a session": obj.session_params is not None or obj.session_id is not None,
        "a custom logit processor": obj.custom_logit_processor is not None,
    }
    return next((name for name, present in checks.items() if present), None)


# ---- sglext.specgen


class SpecGenExt(SglExt):
    """SGLang's extension object with ours beside its own fields."""

    specgen: dict[str, Any] | None = None

    @model_serializer(mode="wrap")
    def _serialize(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class SearchResponse(ChatCompletionResponse):
    sglext: SpecGenExt | None = None


class SearchChunk(ChatCompletionStreamResponse):
    sglext: SpecGenExt | None = None


def build_chat_response(
    original: Callable[..., Any], serving: Any, request: Any, ret: list[dict[str, Any]], created: int
) -> Any:
    report = ret[0]["meta_info"].pop("specgen", None)
    response = original(serving, request, ret, created)
    if report is None or not isinstance(response, ChatCompletionResponse):
        return response
    own = response.sglext.model_dump() if response.sglext else {}
    return SearchResponse.model_construct(**{**dict(response), "sglext": SpecGenExt(**own, specgen=report)})


async def generate_chat_stream(
    original: Callable[..., AsyncGenerator[str, None]],
    serving: Any,
    adapted_request: Any,
    request: Any,
    raw_request: Any,
) -> AsyncIterator[str]:
    """The report travels in one more chunk, before [DONE], to requests that named specgen."""
    stream = original(serving, adapted_request, request, raw_request)
    try:
        async for line in stream:
            if line.startswith("data: [DONE]") and (report := _report_of(serving, adapted_request)) is not None:
                chunk = SearchChunk(
                    id=adapted_request.rid, created=int(time.time()), choices=[], model=request.model,
                    sglext=SpecGenExt(specgen=report),
                )  # fmt: skip
                yield f"data: {chunk.model_dump_json()}\n\n"
            yield line
    finally:
        await stream.aclose()


def _report_of(serving: Any, adapted_request: Any) -> dict[str, Any] | None:
    controller: Controller = serving.tokenizer_manager.specgen
    rid = adapted_request.rid
    record = controller.record(rid) if isinstance(rid, str) else None
    return record.to_dict() if record is not None and record.named else None

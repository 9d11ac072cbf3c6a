"""The engine behind one transport: what a Session needs of SGLang, and nothing else. Tests give it a mock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Output:
    """State of a request after some step: all output ids and text so far, and SGLang's meta_info."""

    ids: list[int]
    text: str
    meta: dict[str, Any]

    @property
    def finish(self) -> dict[str, Any] | None:
        return self.meta.get("finish_reason")


class Engine(Protocol):
    """generate_base streams the client's own request; generate_fork a new one with explicit input ids."""

    def encode(self, text: str) -> list[int]: ...
    def generate_base(self) -> AsyncIterator[Output]: ...
    def generate_fork(self, rid: str, ids: list[int], options: dict[str, Any]) -> AsyncIterator[Output]: ...
    def abort(self, rid: str) -> None: ...
    def send(self, message: Any) -> None: ...
    async def client_gone(self) -> bool: ...


class SGLangEngine:
    """One base request in SGLang's TokenizerManager; `generate` is generate_request without our hook."""

    def __init__(
        self, manager: Any, generate: Callable[..., AsyncIterator[dict[str, Any]]], obj: Any, request: Any
    ) -> None:
        self._manager, self._generate, self._obj, self._request = manager, generate, obj, request

    def encode(self, text: str) -> list[int]:
        return list(self._manager.tokenizer.encode(text, add_special_tokens=False))

    async def generate_base(self) -> AsyncIterator[Output]:
        async for output in self._outputs(self._obj, self._request):
            yield output

    async def generate_fork(self, rid: str, ids: list[int], options: dict[str, Any]) -> AsyncIterator[Output]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        base = self._obj
        sampling = {
            key: value for key, value in (base.sampling_params or {}).items() if key not in ("n", "custom_params")
        }
        fork = GenerateReqInput(
            rid=rid,
            input_ids=ids,
            sampling_params={**sampling, **options},
            stream=True,
            lora_path=base.lora_path,
            extra_key=base.extra_key,
            routing_key=base.routing_key,
            routed_dp_rank=base.routed_dp_rank,
            log_metrics=False,
        )
        async for output in self._outputs(fork, None):
            yield output

    async def _outputs(self, obj: Any, request: Any) -> AsyncIterator[Output]:
        ids: list[int] = []
        text = ""
        incremental = obj.stream and self._manager.incremental_streaming_output
        async for out in self._generate(self._manager, obj, request):
            if incremental:
                ids.extend(out["output_ids"])
                text += out["text"]
            else:
                ids, text = out["output_ids"], out["text"]
            yield Output(ids, text, out["meta_info"])

    def abort(self, rid: str) -> None:
        self._manager.abort_request(rid)

    def send(self, message: Any) -> None:
        """Pickled where a data-parallel controller is between, which knows SGLang's message types alone."""
        if self._obj.routed_dp_rank is None:
            return self._manager._dispatch_to_scheduler(message)
        from sglang.srt.managers.io_struct import wrap_as_pickle

        message.replica = self._obj.routed_dp_rank
        self._manager._dispatch_to_scheduler(wrap_as_pickle(message))

    async def client_gone(self) -> bool:
        return self._request is not None and not self._obj.background and await self._request.is_disconnected()

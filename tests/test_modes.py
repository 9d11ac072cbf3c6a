"""The support matrix: each refused mode by itself, models that can't be forked, one warning for what stays ordinary."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from specgen_engine import modes
from specgen_engine.config import KvConfig, SpecGenConfig

ON: dict[str, dict[str, Any]] = {
    "several tokenizer workers": {"tokenizer_worker_num": 2},
    "data parallel attention": {"enable_dp_attention": True},
    "remote KV tier beside data parallel": {"dp_size": 2, "specgen": SpecGenConfig(kv=KvConfig(tier="peer"))},
    "pipeline parallel": {"pp_size": 2},
    "context parallel": {"attn_cp_size": 2},
    "several nodes": {"nnodes": 2},
    "speculative decoding with a chain of drafts (MTP, EAGLE)": {"speculative_algorithm": "EAGLE"},
    "other speculative decoding (a tree of drafts, EAGLE3, NGRAM, ...)": {
        "speculative_algorithm": "EAGLE",
        "speculative_eagle_topk": 4,
    },
    "HiCache in host memory beside speculative decoding": {
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": "draft",
        "enable_hierarchical_cache": True,
    },
    "prefill/decode disaggregation": {"disaggregation_mode": "decode"},
    "encoder disaggregation": {"encoder_only": True},
    "prefill/decode multiplexing": {"enable_pdmux": True},
    "no radix cache": {"disable_radix_cache": True},
    "other radix caches": {"enable_lmcache": True},
    "no tokenizer": {"skip_tokenizer_init": True},
    "embedding models": {"is_embedding": True},
    "diffusion language models": {"dllm_algorithm": "LowConfidence"},
    "legacy gRPC server": {"smg_grpc_mode": True},
    "other page sizes": {"page_size": 128},
}


def defaults_of(server_args: type) -> dict[str, Any]:
    """SGLang's own defaults; its arguments were a dataclass in 0.5.17 and are a msgspec structure in 0.5.23."""
    if dataclasses.is_dataclass(server_args):
        return {field.name: field.default for field in dataclasses.fields(server_args)}
    return {field.name: field.default for field in msgspec.structs.fields(server_args)}


@pytest.mark.parametrize(("tier", "refused"), [("off", 1), ("host", 1), ("peer", 0), ("loopback", 0)])
def test_beside_drafts_prefixes_are_kept_by_our_tier_alone(tier: Any, refused: int) -> None:
    from sglang.srt.server_args import ServerArgs

    values = ON["HiCache in host memory beside speculative decoding"]
    settings = SpecGenConfig(kv=KvConfig(tier=tier))
    assert len(modes.refusals(SimpleNamespace(**{**defaults_of(ServerArgs), **values}, specgen=settings))) == refused


def test_each_refused_mode_is_refused_by_itself_with_its_reason() -> None:
    from sglang.srt.server_args import ServerArgs

    defaults = defaults_of(ServerArgs)
    assert modes.refusals(SimpleNamespace(**defaults)) == []
    assert set(ON) == {mode.name for mode in modes.MODES if mode.is_on is not None}
    for name, values in ON.items():
        assert values.keys() - {"specgen"} <= defaults.keys(), f"{name}: SGLang has no such argument any more"
        (line,) = modes.refusals(SimpleNamespace(**{**defaults, **values}))
        (mode,) = (mode for mode in modes.MODES if mode.name == name)
        assert line == f"{mode.option}: {mode.why}"
        assert mode.verdict == "refused"
        assert "; " in mode.why, f"{name}: say what to do instead"


@pytest.mark.parametrize(
    ("swa", "mamba", "generates", "says"),
    [(True, False, True, "full attention"), (False, True, True, "full attention"), (False, False, False, "embedding")],
)
def test_a_model_whose_prefixes_cannot_be_forked_stops_start_up(
    swa: bool, mamba: bool, generates: bool, says: str
) -> None:
    tree = SimpleNamespace(supports_swa=lambda: swa, supports_mamba=lambda: mamba)
    assert says in (modes.tree_refusal(tree, generates) or "")
    plain = SimpleNamespace(supports_swa=lambda: False, supports_mamba=lambda: False)
    assert modes.tree_refusal(plain, True) is None


def test_a_mode_that_only_lacks_a_run_can_be_tried_by_its_name() -> None:
    name = "speculative decoding with a chain of drafts (MTP, EAGLE)"
    on = SimpleNamespace(speculative_algorithm="EAGLE", speculative_eagle_topk=1)
    assert len(modes.refusals(on, {})) == 1
    assert modes.refusals(on, {modes.TRY: f"pipeline parallel; {name}"}) == []
    stages = SimpleNamespace(speculative_algorithm=None, pp_size=2)
    assert len(modes.refusals(stages, {modes.TRY: "pipeline parallel"})) == 1


def test_of_the_models_with_a_window_deepseek_v4_alone_is_served() -> None:
    tree = SimpleNamespace(supports_swa=lambda: True, supports_mamba=lambda: False)
    assert modes.tree_refusal(tree, True, "DeepseekV4ForCausalLM") is None
    assert modes.tree_refusal(tree, True, "Gemma3ForCausalLM") is not None
    assert modes.tree_refusal(tree, False, "DeepseekV4ForCausalLM") is not None


def test_a_draft_model_is_served_and_a_models_own_layers_or_other_workers_are_not() -> None:
    eagle = {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 1, "model_path": "target"}
    assert modes.refusals(SimpleNamespace(**eagle, speculative_draft_model_path="draft"), {}) == []
    (own,) = modes.refusals(SimpleNamespace(**eagle, speculative_draft_model_path="target"), {})
    assert "MTP layers" in own
    for name, lines in (("GlmMoeDsaForCausalLM", 0), ("DeepseekV4ForCausalLM", 0), ("DeepseekV3ForCausalLM", 1)):
        model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[name]))
        mtp = SimpleNamespace(**eagle, speculative_draft_model_path="target", model_config=model)
        assert len(modes.refusals(mtp, {})) == lines, name
        mtp.specgen = SpecGenConfig(kv=KvConfig(tier="peer"))
        beside = 0 if name == "GlmMoeDsaForCausalLM" else 1
        assert len(modes.refusals(mtp, {})) == beside, f"{name} with the tier"
    for other in ({"enable_multi_layer_eagle": True}, {"speculative_adaptive": True}, {"speculative_eagle_topk": 4}):
        values = {**eagle, "speculative_draft_model_path": "draft", **other}
        (line,) = modes.refusals(SimpleNamespace(**values), {})
        assert "use EAGLE with --speculative-eagle-topk 1" in line


def test_deepseek_v4_has_pages_of_256_tokens_and_no_other_model_has() -> None:
    v4 = SimpleNamespace(speculative_algorithm=None, attention_backend="dsv4", page_size=256)
    assert modes.refusals(v4, {}) == []
    assert len(modes.refusals(SimpleNamespace(**{**vars(v4), "attention_backend": "triton"}), {})) == 1


def test_the_documents_table_is_the_codes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "support.md").read_text()
    matrix = text[text.index("| mode |") :].split("\n\n")[0]
    rows = [line for line in matrix.splitlines() if line.startswith("| ") and not line.startswith("| mode |")]
    assert rows == [f"| {mode.name} | `{mode.option}` | {mode.verdict} | {mode.why} |" for mode in modes.MODES]


REQUESTS: dict[str, dict[str, Any]] = {
    "a session": {"session_params": {"id": "s"}},
    "structured output": {"sampling_params": {"json_schema": "{}"}},
    "n above 1": {"sampling_params": {"n": 2}},
    "logprobs": {"return_logprob": True},
    "input embeddings": {"input_embeds": [[0.0]]},
    "hidden states": {"return_hidden_states": True},
    "images, video or audio": {"image_data": ["x"]},
    "a custom logit processor": {"custom_logit_processor": "x"},
}


async def outputs_of(values: dict[str, Any], specgen: Any = None) -> list[Any]:
    """What a request gets from the server's hook, over an engine that answers everything with one output."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    from specgen_engine.controller import hooks

    request = GenerateReqInput(**{"text": "hello", "sampling_params": {}, **values})
    request.specgen_chat = hooks.ChatNote(tools=False, prompt="hello")
    if specgen is not None:
        request.sampling_params["custom_params"] = {"specgen": specgen}

    async def original(manager: Any, obj: Any, raw: Any) -> AsyncIterator[str]:
        yield "ordinary"

    manager = SimpleNamespace(specgen=SimpleNamespace(reads_prompts=True, settings=None, prompt_tasks_refused=""))
    return [output async for output in hooks.generate_request(original, manager, request, None)]


@pytest.mark.parametrize(("reason", "values"), REQUESTS.items(), ids=REQUESTS)
def test_an_ordinary_mode_is_served_with_one_warning_and_refused_when_it_names_specgen(
    reason: str, values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from specgen_engine.controller import hooks
    from specgen_engine.errors import RequestError

    hooks._served_without_forks.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert asyncio.run(outputs_of(values)) == ["ordinary"]
        assert asyncio.run(outputs_of(values)) == ["ordinary"]
    warnings = [record.getMessage() for record in caplog.records if record.name == hooks.__name__]
    assert warnings == [f"specgen: requests with {reason} are served without forks (docs/support.md)"]
    with pytest.raises(RequestError, match=f"not with {reason}"):
        asyncio.run(outputs_of(values, specgen="{}"))

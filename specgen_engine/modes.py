"""The support matrix: modes of SGLang that touch forks, and what becomes of each. docs/support.md shows this table.

works: forks in this mode, by a test that is named. ordinary: such a request is served as SGLang serves it, with one
warning; one that names specgen gets a 400 with the reason. refused: the server does not start, and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

TRY = "SPECGEN_TRY_MODES"
Verdict = Literal["works", "ordinary", "refused"]


class Mode(NamedTuple):
    """`option` is what an operator or a client sets. is_on: whether ServerArgs have it on; None: told elsewhere.

    why: for a refused mode the reason and what to do instead; else what holds, or the test that shows it. untested:
    refused for want of a run only; SPECGEN_TRY_MODES, naming it, starts it all the same.
    """

    name: str
    option: str
    verdict: Verdict
    why: str
    is_on: Callable[[Any], bool] | None = None
    untested: bool = False


def _set(*names: str) -> Callable[[Any], bool]:
    return lambda arguments: any(getattr(arguments, name, None) for name in names)


def _above(name: str, least: int) -> Callable[[Any], bool]:
    return lambda arguments: (getattr(arguments, name, None) or least) > least


def _chained(arguments: Any) -> bool:
    """Drafts one after the other, by one worker, whose KV stays where it was written when they are accepted."""
    other = _set("enable_multi_layer_eagle", "speculative_adaptive")(arguments)
    return arguments.speculative_algorithm == "EAGLE" and (arguments.speculative_eagle_topk or 1) == 1 and not other


OWN_LAYERS_RAN = {"GlmMoeDsaForCausalLM": "with the tier", "DeepseekV4ForCausalLM": "without the tier"}


def _own_layers(arguments: Any) -> bool:
    """The drafts come from layers of the model itself (MTP), not from a draft model, and theirs have not run so."""
    draft = getattr(arguments, "speculative_draft_model_path", None)
    own = draft in (None, getattr(arguments, "model_path", None))
    ran = OWN_LAYERS_RAN.get(_architecture(arguments), "")
    has_run = ran == "with the tier" or bool(ran and not _own_tier(arguments))
    return _chained(arguments) and own and not has_run


def _architecture(arguments: Any) -> str:
    """The model's class, from the config that SGLang has read by then; empty where it has not."""
    config = getattr(getattr(arguments, "model_config", None), "hf_config", None)
    return next(iter(getattr(config, "architectures", None) or ()), "")


def _host_cache(arguments: Any) -> bool:
    """HiCache in host memory, SGLang's own or --specgen-kv host, beside drafts."""
    hierarchical = bool(getattr(arguments, "enable_hierarchical_cache", False))
    return hierarchical and not _own_tier(arguments) and bool(arguments.speculative_algorithm)


def _own_tier(arguments: Any) -> bool:
    settings = getattr(arguments, "specgen", None)
    return settings is not None and settings.kv.tier in ("peer", "loopback")


def _tier_of_replicas(arguments: Any) -> bool:
    settings = getattr(arguments, "specgen", None)
    return _above("dp_size", 1)(arguments) and settings is not None and settings.kv.tier != "off"


def _page_sizes(arguments: Any) -> tuple[int | None, ...]:
    return (256,) if getattr(arguments, "attention_backend", None) == "dsv4" else (None, 1, 16, 32, 64)


MODES: tuple[Mode, ...] = (
    Mode("tensor parallel", "--tp-size", "works",
         "tests/engine/test_modes.py, two CPU ranks over gloo; bench.models, GLM-5 and DeepSeek-V4 on two H200"),
    Mode("page size 1, 16, 32, 64", "--page-size", "works", "tests/engine/test_fork_kv.py"),
    Mode("overlap scheduling, on and off", "--disable-overlap-schedule", "works", "tests/engine/test_fork_kv.py"),
    Mode("chunked prefill", "--chunked-prefill-size", "works", "tests/engine/test_fork_kv.py"),
    Mode("LoRA", "--enable-lora, --lora-paths", "works",
         "tests/engine/test_modes.py: forks are sent under their base's adapter"),
    Mode("speculative decoding with an EAGLE draft model", "--speculative-algorithm EAGLE --speculative-eagle-topk 1",
         "works", "tests/engine/test_speculative.py: SGLang's worker on the CPU engine, its kernels in torch; greedy"),
    Mode("speculative decoding with GLM-5's or DeepSeek-V4's own layers (MTP)",
         "--speculative-algorithm EAGLE --speculative-eagle-topk 1", "works",
         "bench.models on an H200: 64 forks, a storm, strict accounting; random weights, drafts taken for right by "
         "SGLang's SGLANG_SIMULATE_ACC_LEN"),
    Mode("remote KV tier beside an EAGLE draft model", "--specgen-kv", "works",
         "tests/engine/test_speculative_tier.py: on the CPU engine; the draft's KV comes back with the target's, so "
         "that as many drafts are right after a restore as before"),
    Mode("remote KV tier beside GLM-5's own layers (MTP)", "--specgen-kv peer, loopback", "works",
         "bench.models on two H200: 64 forks, a storm, restores of 8k to 128k tokens with the draft layer's KV"),
    Mode("DeepSeek-V4", "--model-path", "works",
         "bench.models on an H200: 64 forks, equal to an empty cache in the deterministic mode, and a storm"),
    Mode("remote KV tier of DeepSeek-V4", "--specgen-kv peer, loopback", "works",
         "bench.models on two H200: 64 forks, a storm, restores of 8k to 128k tokens; losses and two ranks on a CPU"),
    Mode("data parallel", "--dp-size", "works",
         "tests/engine/test_replicas.py: a search's base, forks and messages keep to one replica of two"),
    Mode("sessions", "session_params, session_id", "ordinary",
         "a session's requests append to each other's KV; servers with --enable-streaming-session fork other requests"),
    Mode("structured output", "response_format, regex, ebnf, structural_tag", "ordinary",
         "a grammar holds for the whole output, and a fork's answer is a module"),
    Mode("tools", "tools", "ordinary", "a tool call is no answer with a kernel"),
    Mode("several answers", "n above 1, a batch of prompts", "ordinary", "one search has one base"),
    Mode("logprobs, hidden states, input embeddings", "logprobs, return_hidden_states, input_embeds", "ordinary",
         "a grafted answer has none of its own positions"),
    Mode("images, video, audio", "image_url, ...", "ordinary", "a fork's input ids would miss their embeddings"),
    Mode("custom logit processors", "custom_logit_processor", "ordinary", "they are not carried over to forks"),
    Mode("other routes", "/v1/completions, /generate, /v1/messages, /v1/responses", "ordinary",
         "reasoning and answer are told apart on /v1/chat/completions"),
    Mode("offline Engine", "sglang.Engine", "ordinary", "it reads no command line, so the flag is never on"),
    Mode("several tokenizer workers", "--tokenizer-worker-num", "refused",
         "tokenizer workers load no plugins, and a search's messages would reach any of them; use 1",
         _above("tokenizer_worker_num", 1)),
    Mode("data parallel attention", "--enable-dp-attention", "refused",
         "not run: its ranks step together, and what a search tells one of them comes by way of all; use --dp-size "
         "alone", _set("enable_dp_attention"), untested=True),
    Mode("remote KV tier beside data parallel", "--specgen-kv beside --dp-size", "refused",
         "replicas would be one borrower to their lender, by their common parent's number; use off, or one server a "
         "replica", _tier_of_replicas),
    Mode("pipeline parallel", "--pp-size", "refused",
         "several microbatches are in flight, and a fork point would be inserted in the midst of one; use --tp-size",
         _above("pp_size", 1)),
    Mode("context parallel", "--attn-cp-size", "refused", "a rank holds part of a sequence, untested; use --tp-size",
         _above("attn_cp_size", 1)),
    Mode("several nodes", "--nnodes", "refused", "other nodes' schedulers do not report their hooks; use one node",
         _above("nnodes", 1)),
    Mode("speculative decoding with a chain of drafts (MTP, EAGLE)", "--speculative-algorithm EAGLE", "refused",
         "where the drafts come from the model's own MTP layers it has run on a GPU for GLM-5 and DeepSeek-V4, "
         "DeepSeek-V4 without the remote KV tier only; leave it out, or the tier", _own_layers, untested=True),
    Mode("other speculative decoding (a tree of drafts, EAGLE3, NGRAM, ...)", "--speculative-algorithm", "refused",
         "accepted drafts of a tree are moved to other slots, and other drafters, several layers of them or adaptive "
         "lengths are untested; use EAGLE with --speculative-eagle-topk 1",
         lambda arguments: bool(arguments.speculative_algorithm) and not _chained(arguments)),
    Mode("HiCache in host memory beside speculative decoding",
         "--enable-hierarchical-cache, --specgen-kv host", "refused",
         "not run: the draft's KV is kept there too, apart from the target's; use --specgen-kv peer or off",
         _host_cache, untested=True),
    Mode("prefill/decode disaggregation", "--disaggregation-mode", "refused",
         "a fork prefills where its base decodes; leave it out",
         lambda arguments: getattr(arguments, "disaggregation_mode", "null") != "null"),
    Mode("encoder disaggregation", "--encoder-only, --language-only", "refused",
         "half a model answers nothing by itself; leave it out", _set("encoder_only", "language_only")),
    Mode("prefill/decode multiplexing", "--enable-pdmux", "refused",
         "its event loop prefills beside the running batch, untested; leave it out", _set("enable_pdmux")),
    Mode("no radix cache", "--disable-radix-cache", "refused", "fork points live in the radix tree; leave it out",
         _set("disable_radix_cache")),
    Mode("other radix caches", "--radix-cache-backend, --enable-lmcache, --enable-flexkv", "refused",
         "fork points are tested on SGLang's own tree; leave it out",
         _set("radix_cache_backend", "enable_lmcache", "enable_flexkv")),
    Mode("other hybrid models (sliding window, Mamba)", "--model-path", "refused",
         "the state of a prefix can't be published at any token; serve a model with full attention"),
    Mode("no tokenizer", "--skip-tokenizer-init", "refused", "triggers and grafts need the text; leave it out",
         _set("skip_tokenizer_init")),
    Mode("embedding models", "--is-embedding", "refused", "they do not reason; leave --enable-specgen out",
         _set("is_embedding")),
    Mode("diffusion language models", "--dllm-algorithm", "refused",
         "they do not write from left to right; leave --enable-specgen out", _set("dllm_algorithm")),
    Mode("legacy gRPC server", "--smg-grpc-mode", "refused", "/specgen and chat are HTTP; use the HTTP server",
         _set("smg_grpc_mode", "grpc_mode")),
    Mode("other page sizes", "--page-size", "refused", "untested; use 1, 16, 32 or 64",
         lambda arguments: getattr(arguments, "page_size", None) not in _page_sizes(arguments)),
)  # fmt: skip


def refusals(server_args: Any, environ: Mapping[str, str] = os.environ) -> list[str]:
    """One line a mode that is on and refused: option, reason, what to do."""
    on = [mode for mode in MODES if mode.verdict == "refused" and mode.is_on is not None and mode.is_on(server_args)]
    return [f"{mode.option}: {mode.why}" for mode in on if not _tried(mode, environ)]


def tree_refusal(tree_cache: Any, is_generation: bool, architecture: str = "") -> str | None:
    """What only the loaded model tells: why forks cannot run on this scheduler, or None."""
    if not is_generation:
        return "an embedding model does not reason; leave --enable-specgen out"
    if not (tree_cache.supports_swa() or tree_cache.supports_mamba()) or architecture.startswith("DeepseekV4"):
        return None
    (mode,) = (mode for mode in MODES if mode.name.startswith("other hybrid models"))
    return f"{type(tree_cache).__name__}: {mode.why}"


def _tried(mode: Mode, environ: Mapping[str, str]) -> bool:
    """Whether the operator asked for a mode that is refused for want of a run only."""
    return mode.untested and mode.name in (name.strip() for name in environ.get(TRY, "").split(";"))

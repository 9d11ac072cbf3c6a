"""Collect what a GPU host without network needs, besides SGLang itself, to run bench.kv_tier.

    python -m bench.kv_tier_pack OUT [--prebuilt _kv.cpython-312-x86_64-linux-gnu.so]

OUT/qwen3-8b and OUT/small: configurations and a tokenizer, for random weights; OUT/site: the package's entry points, so
that SGLang finds the plugin in an unpacked tree; OUT/cutlass_util: headers that FlashInfer compiles its kernels with;
OUT/COMMIT.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.plugin_pack import pack_plugin
from specgen_engine.serving.models import smollm2

ROOT = Path(__file__).resolve().parent.parent


def qwen3(hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, Any]:
    """Qwen3's shape: 8 KV heads of 128; more positions than the released model, for a prefix of 64,000 tokens."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 131_072,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151_936,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_tier_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--prebuilt", type=Path)
    args = parser.parse_args()
    # The small one says text of its tokenizer, so that it can be searched.
    shapes = {"qwen3-8b": qwen3(4096, 36, 32, 12_288), "small": qwen3(1024, 4, 16, 3_072) | {"vocab_size": 49_152}}
    source = smollm2()
    for name, config in shapes.items():
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in ("tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(source / file, folder / file)
    shutil.copyfile(source / "tokenizer.json", args.out / "tokenizer.json")
    flashinfer = find_spec("flashinfer")
    if flashinfer is None or not flashinfer.submodule_search_locations:
        print("error: FlashInfer isn't installed: install sglang, which brings it", file=sys.stderr)
        return 1
    headers = Path(flashinfer.submodule_search_locations[0]) / "data" / "cutlass" / "tools" / "util" / "include"
    shutil.copytree(headers, args.out / "cutlass_util", dirs_exist_ok=True)
    pack_plugin(args.out, args.prebuilt)
    return 0


if __name__ == "__main__":
    sys.exit(main())

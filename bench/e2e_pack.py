"""Collect what a GPU host without network needs, besides SGLang itself, to run bench.end_to_end.

    python -m bench.e2e_pack OUT --traces DIR... --prebuilt _kv.cpython-312-x86_64-linux-gnu.so

OUT/site: the package's entry points, so that SGLang finds the plugin; OUT/qwen3-8b and OUT/qwen3-32b: configurations
with DeepSeek-V4's tokenizer, for random weights; OUT/traces: the recordings; OUT/prebuilt: the KV extension, which the
plugin needs; OUT/COMMIT.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from bench.kv_tier_pack import qwen3
from bench.plugin_pack import pack_plugin
from specgen_engine.serving.models import tiny_model

# hidden size, layers, heads, intermediate size
SHAPES = {"qwen3-8b": (4096, 36, 32, 12_288), "qwen3-32b": (5120, 64, 64, 25_600)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.e2e_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="DIR", help="folders of task folders")
    parser.add_argument("--prebuilt", type=Path, required=True, help="the KV extension, built for the host's Python")
    args = parser.parse_args()
    source = tiny_model()
    for name, shape in SHAPES.items():
        folder = args.out / name
        shutil.copytree(source, folder, dirs_exist_ok=True)
        config = {**qwen3(*shape), "bos_token_id": 0, "eos_token_id": 1}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for traces in args.traces:
        shutil.copytree(traces, args.out / "traces" / traces.resolve().name, dirs_exist_ok=True)
    pack_plugin(args.out, args.prebuilt)
    return 0


if __name__ == "__main__":
    sys.exit(main())

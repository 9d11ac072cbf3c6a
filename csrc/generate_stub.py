"""Write specgen_engine/_kv.pyi from the built extension: `python csrc/generate_stub.py` (needs pybind11-stubgen).

Built with CUDA, so that the stub has every name.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pybind11_stubgen", "specgen_engine._kv", "--output-dir", scratch]
        subprocess.run([*command, "--numpy-array-wrap-with-annotated"], check=True, cwd=ROOT)
        text = next(Path(scratch).rglob("_kv.pyi")).read_text()
    (ROOT / "specgen_engine" / "_kv.pyi").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The extension itself: one clear error where it isn't built, a stub that matches it where it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from specgen_engine.kv.native import _kv

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
sys.modules["specgen_engine._kv"] = None
import specgen_engine.kv.arena
"""


def test_without_the_extension_one_error_with_the_remedy() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"ImportError: the KV transport's extension .* build it with `pip install --no-build-isolation", last
    )


def test_stub_names_what_the_extension_has() -> None:
    stub = (ROOT / "specgen_engine" / "_kv.pyi").read_text()
    declared = set(re.findall(r"^(?:class|def) (\w+)", stub, re.MULTILINE)) | set(
        re.findall(r"^(\w+):", stub, re.MULTILINE)
    )
    public = {name for name in dir(_kv) if not name.startswith("_")}
    missing = public - declared
    assert not missing, f"run `python csrc/generate_stub.py`: the stub lacks {sorted(missing)}"

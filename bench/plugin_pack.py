"""What every packed tree needs for SGLang to find the plugin in it; for the packs of the GPU benches."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.machine import commit
from specgen_engine import __version__


def pack_plugin(out: Path, prebuilt: Path | None) -> None:
    """OUT/site: the package's entry points; OUT/prebuilt: the KV extension, where one is given; OUT/COMMIT."""
    info = out / "site" / f"specgen_engine-{__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: specgen-engine\nVersion: {__version__}\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nspecgen = specgen_engine.plugin:load\n")
    if prebuilt is not None:
        (out / "prebuilt").mkdir(exist_ok=True)
        shutil.copyfile(prebuilt, out / "prebuilt" / prebuilt.name)
    (out / "COMMIT").write_text((commit() or "unknown") + "\n")

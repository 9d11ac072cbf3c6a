"""The process that imports SGLang once for every CPU server of a test run (25 s), while tests that need none run."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from specgen_engine import versions
from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template

STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "HF_HUB_OFFLINE": "1",
    # With two ranks SGLang compiles the embedding's mask in each, a minute of a busy core; no candidate here compiles.
    "TORCH_COMPILE_DISABLE": "1",
}
ARCHITECTURES = "SGLANG_DISABLED_MODEL_ARCHS"
# Of no effect on servers without --speculative-algorithm; written for one release.
HAS_STAND_INS = versions.current().version == "0.5.17"
STAND_INS = ("tests.engine.speculative_cpu", "tests.engine.speculative_script") if HAS_STAND_INS else ()


TRACING = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
"""SGLang chooses its exporter while it is imported."""


def new_template(log: Path, *options: str) -> Template:
    """For servers of Llamas and of their EAGLE drafts."""
    environment = {**prepare(["--tiny", *options]).environment, **STRICT, **TRACING}
    disabled = environment[ARCHITECTURES].split(",")
    environment[ARCHITECTURES] = ",".join(name for name in disabled if name != "llama_eagle")
    return Template(environment, log, STAND_INS)


class Ahead:
    """One template for the whole run; begin() returns at once."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._template: Template | None = None

    def begin(self) -> Template:
        if self._template is None:
            self._folder = Path(tempfile.mkdtemp(prefix="specgen-template-"))
            self._template = new_template(self._folder / "log")
        return self._template

    def end(self) -> None:
        if self._template is not None:
            self._template.close()
            self._template = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


shared = Ahead()

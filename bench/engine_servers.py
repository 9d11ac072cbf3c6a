"""Servers for the engine benches: real SGLang on the CPU engine, forked from one process that has imported it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import Server, running_server


class Wanted(NamedTuple):
    """A server to start: `specgen serve` arguments, and whether the flag is on."""

    arguments: Sequence[str]
    specgen: bool = True


@contextmanager
def together(folder: Path, *wanted: Wanted) -> Iterator[tuple[Server, ...]]:
    """All servers up at once; their logs are in `folder`. Raises SpecGenError when one does not come up."""
    launches = [prepare([*want.arguments, "--log-level", "warning"]) for want in wanted]
    environment = {**launches[0].environment, "HF_HUB_OFFLINE": "1"}
    with Template(environment, folder / "template.log") as template, ExitStack() as stack:
        servers = []
        for number, (want, launch) in enumerate(zip(wanted, launches, strict=True)):
            words = [word for word in launch.arguments if want.specgen or word != "--enable-specgen"]
            log = folder / f"server{number}.log"
            servers.append(stack.enter_context(running_server(words, log, environment, template=template)))
        yield tuple(servers)

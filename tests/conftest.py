"""Skips tests marked `gpu(count)` on machines with fewer GPUs, with the reason that reports are read for; fixtures for
tests of radix caches and of real servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

SERVERS = ("engine", "live")
settings.register_profile("any machine", deadline=None)  # an example that imports SGLang, or waits for a CPU, is right
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = {item: _gpus_wanted(marker) for item in items if (marker := item.get_closest_marker("gpu"))}
    if not wanted:
        return
    present = _gpu_count()
    for item, count in wanted.items():
        if present < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} GPU{'s' if count > 1 else ''}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What servers are forked from is imported while the first tests run."""
    if session.config.option.collectonly or not any(map(_starts_servers, session.items)):
        return
    from tests.template import shared

    shared.begin()


def pytest_sessionfinish() -> None:
    if loaded := sys.modules.get("tests.template"):
        loaded.shared.end()


def _starts_servers(item: pytest.Item) -> bool:
    return item.path.parent.name in SERVERS and "template" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def template() -> Any:
    """Servers of tests/engine and tests/live are forked from it."""
    from tests.template import shared

    return shared.begin()


def _gpus_wanted(marker: pytest.Mark) -> int:
    return int(marker.kwargs.get("count", marker.args[0] if marker.args else 1))


def _gpu_count() -> int:
    """By NVML, which makes no CUDA context in the test process."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return 0
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process group of this process alone, as a radix cache wants one. torch is imported where it is used only."""
    import torch.distributed as dist

    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()

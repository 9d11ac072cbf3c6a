"""The server's pool profiles only where the operator asks for it. Slow: the hooks import SGLang."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from specgen_engine.config import SpecGenConfig


@pytest.mark.slow
def test_the_servers_pool_profiles_only_where_the_operator_asks_for_it(tmp_path: Path) -> None:
    from specgen_engine.controller.hooks import make_pool

    server = SimpleNamespace(device="cpu")
    for flag, options in (("off", {}), ("auto", {"profile": "auto"})):
        settings = SpecGenConfig.model_validate({"evaluation": {"profile": flag, "cache": str(tmp_path)}})
        assert dict(make_pool(settings, server).evaluate_options or {}) == options


def test_only_tools_that_exist_can_be_configured() -> None:
    assert SpecGenConfig().evaluation.profile == "off"
    with pytest.raises(ValueError, match="profile"):
        SpecGenConfig.model_validate({"evaluation": {"profile": "perf"}})

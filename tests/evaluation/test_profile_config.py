"""Which tools a server's candidates can be profiled with."""

from __future__ import annotations

import pytest

from specgen_engine.config import SpecGenConfig


def test_only_tools_that_exist_can_be_configured() -> None:
    assert SpecGenConfig().evaluation.profile == "off"
    with pytest.raises(ValueError, match="profile"):
        SpecGenConfig.model_validate({"evaluation": {"profile": "perf"}})

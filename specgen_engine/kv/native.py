"""The C++ extension, or one clear error."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import specgen_engine._kv as _kv
else:
    try:
        from specgen_engine import _kv
    except ImportError as error:
        raise ImportError(
            f"the KV transport's extension specgen_engine._kv isn't usable here ({error}): build it with "
            "`pip install --no-build-isolation --no-deps -e .` in the project's root"
        ) from error

__all__ = ["_kv"]

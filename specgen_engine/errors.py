"""Errors that people read: each names the field, the value and the remedy."""

from __future__ import annotations


class SpecGenError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SpecGenError):
    """A configuration file or flag that cannot be used; the server refuses to start."""


class HookError(SpecGenError):
    """SGLang does not have the shape that a hook expects; names the SGLang version."""


class RequestError(SpecGenError, ValueError):
    """A request that names specgen and cannot be served.

    Also a ValueError, since SGLang's OpenAI routes answer those with status 400.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"custom_params.specgen.{field}: {message}" if field else f"custom_params.specgen: {message}")

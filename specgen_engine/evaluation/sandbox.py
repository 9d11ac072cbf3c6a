"""What a candidate's process may reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Policy:
    writable: tuple[Path, ...]
    device: str
    level: str


def level(wanted: str) -> str:
    return "process"


def enter(policy: Policy) -> None:
    pass

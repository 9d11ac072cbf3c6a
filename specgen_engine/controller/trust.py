"""Whom the server takes tasks from: a task is code, and one found in a prompt was not even sent as one."""

from __future__ import annotations

import ipaddress
from typing import Any

from specgen_engine.config import SpecGenConfig


def is_loopback(host: str | None) -> bool:
    """Whether an address that a server binds can be reached from its own machine only; no name is looked up."""
    if host is None or host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def prompt_tasks_refused(settings: SpecGenConfig, server_args: Any) -> str:
    """Why no task may be taken from a prompt on this server, with the remedy; "" when it may."""
    if settings.allow_untrusted or server_args.api_key or is_loopback(server_args.host):
        return ""
    return (
        f"this server listens on {server_args.host} without --api-key, so it takes no tasks from prompts; "
        "set --api-key, bind --host 127.0.0.1, or say --specgen-allow-untrusted"
    )

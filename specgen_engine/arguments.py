"""The argument hooks: flags in, a checked configuration out, and the other hooks switched on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from specgen_engine import config, modes, plugin, versions
from specgen_engine.errors import SpecGenError
from specgen_engine.scheduler import reports


def add_cli_args(_result: Any, parser: argparse.ArgumentParser) -> None:
    config.add_arguments(parser)


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """ServerArgs with `specgen` in its __dict__ (it is read-only by then, and pickled to the schedulers)."""
    if not getattr(args, "enable_specgen", False):
        server_args = original(cls, args)
        if given := _given_without_flag(args):
            _refuse(f"{given} needs --enable-specgen")
        return server_args
    try:
        plugin.check_release()
        settings = config.from_arguments(args)
        if settings.kv.tier != "off":
            if refused := versions.tier_refusal(versions.current()):
                raise SpecGenError(f"--specgen-kv {settings.kv.tier}: {refused}")
            from specgen_engine.tier.hooks import prepare_arguments

            settings = prepare_arguments(args, settings)
        server_args = original(cls, args)
        server_args.__dict__["specgen"] = settings
        _refuse_modes(server_args)
        # The scheduler's too: a child made by fork, not spawn, inherits them and loads no plugins again.
        plugin.activate("server")
        plugin.activate("scheduler")
        plugin.mark_active()
        if getattr(server_args, "dp_size", 1) > 1:
            reports.await_reports()
    except SpecGenError as error:
        _refuse(str(error))
    return server_args


def _refuse_modes(server_args: Any) -> None:
    if refused := modes.refusals(server_args):
        raise SpecGenError("--enable-specgen does not go with " + "; ".join(refused))


def check_schedulers(infos: list[dict[str, Any]], *_args: Any, **_kwargs: Any) -> None:
    """Every rank of every replica must report the scheduler hooks; runs in the parent before the server is up."""
    wanted = {hook.target for hook in plugin.HOOKS if hook.process == "scheduler"}
    for rank, report in enumerate(reports.of_schedulers(infos)):
        if missing := wanted - set(report.get("hooks", ())):
            raise RuntimeError(
                f"--enable-specgen: scheduler rank {rank} runs without the hooks on {', '.join(sorted(missing))} "
                f"(SGLang {plugin.sglang_version()}); see its log above for the plugin's error"
            )


def _given_without_flag(args: argparse.Namespace) -> str:
    if getattr(args, "specgen_config", None):
        return "--specgen-config"
    dests = {"specgen__" + "__".join(path): path for path, _ in config.leaves()}
    return next((config.flag_of(path) for dest, path in dests.items() if hasattr(args, dest)), "")


def _refuse(message: str) -> NoReturn:
    print(f"specgen: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)

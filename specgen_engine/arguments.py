"""The argument hooks: flags in, a checked configuration out, and the other hooks switched on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from specgen_engine import config, plugin
from specgen_engine.errors import SpecGenError


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
        settings = config.from_arguments(args)
        if settings.kv.tier != "off":
            from specgen_engine.tier.hooks import prepare_arguments

            settings = prepare_arguments(args, settings)
        server_args = original(cls, args)
        _refuse_modes(server_args)
        server_args.__dict__["specgen"] = settings
        # The scheduler's too: a child made by fork, not spawn, inherits them and loads no plugins again.
        plugin.activate("server")
        plugin.activate("scheduler")
        plugin.mark_active()
    except SpecGenError as error:
        _refuse(str(error))
    return server_args


# What forks cannot do yet, each with what to do instead: (is it on?, message).
REFUSED_MODES: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda a: a.dp_size > 1, "--dp-size above 1: the data-parallel controller loads no plugins; run one server a replica"),
    (lambda a: a.tokenizer_worker_num > 1, "--tokenizer-worker-num above 1: tokenizer workers load no plugins; use 1"),
    (lambda a: a.pp_size > 1, "--pp-size above 1: fork points need all layers in one rank; use --tp-size"),
    (lambda a: a.disaggregation_mode != "null", "--disaggregation-mode: forks need prefill and decode in one engine; leave it out"),
    (lambda a: bool(a.disable_radix_cache), "--disable-radix-cache: fork points live in the radix tree; leave it out"),
    (lambda a: bool(a.skip_tokenizer_init), "--skip-tokenizer-init: triggers and grafts need the text; leave it out"),
    (lambda a: a.speculative_algorithm is not None, "--speculative-algorithm: fork points under speculative decoding are untested; leave it out"),
    (lambda a: a.page_size not in (None, 1, 16, 32, 64), "--page-size other than 1, 16, 32, 64: untested; use one of these"),
)  # fmt: skip


def _refuse_modes(server_args: Any) -> None:
    refused = [message for is_on, message in REFUSED_MODES if is_on(server_args)]
    if refused:
        raise SpecGenError("--enable-specgen does not go with " + "; ".join(refused))


def check_schedulers(infos: list[dict[str, Any]], *_args: Any, **_kwargs: Any) -> None:
    """Every rank must report the scheduler hooks in its init info; runs in the parent before the server is up."""
    wanted = {hook.target for hook in plugin.HOOKS if hook.process == "scheduler"}
    for rank, info in enumerate(infos):
        if missing := wanted - set(info.get("specgen", {}).get("hooks", ())):
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

"""The SGLang plugin: every hook in one table, checked against the signature it expects.

Loaded through the entry point `sglang.srt.plugins` in launch_server, `sglang serve`, Engine and each scheduler process.
Without --enable-specgen only the two argument hooks are active. SGLang merely logs a hook that fails, so activate()
checks each one itself, and every scheduler reports its hooks in its init info: a gap in any process stops start-up.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from specgen_engine import versions
from specgen_engine.errors import HookError, SpecGenError
from specgen_engine.versions import sglang_version

ACTIVE = "SPECGEN_ACTIVE_PID"
Kind = Literal["before", "after", "around"]
Process = Literal["arguments", "server", "scheduler"]


@dataclass(frozen=True, slots=True)
class Hook:
    """One point where SGLang calls us. `expects` are the target's parameter names, in order."""

    process: Process
    target: str
    kind: Kind
    handler: str
    expects: tuple[str, ...]
    purpose: str


SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"

HOOKS: tuple[Hook, ...] = (
    Hook("arguments", "sglang.srt.server_args.ServerArgs.add_cli_args", "after", "specgen_engine.arguments:add_cli_args",
         ("parser",), "the --specgen flags"),
    Hook("arguments", "sglang.srt.server_args.ServerArgs.from_cli_args", "around", "specgen_engine.arguments:from_cli_args",
         ("cls", "args"), "read the flags; activate the hooks below when the flag is on"),
    Hook("server", "sglang.srt.entrypoints.engine._wait_for_scheduler_ready", "after", "specgen_engine.arguments:check_schedulers",
         ("scheduler_pipe_readers", "scheduler_procs"), "refuse to start unless every scheduler reports its hooks"),
    Hook("server", f"{TOKENIZER}.init_request_dispatcher", "after", "specgen_engine.controller.hooks:attach",
         ("self",), "create the controller; route trigger messages to it"),
    Hook("server", f"{TOKENIZER}.generate_request", "around", "specgen_engine.controller.hooks:generate_request",
         ("self", "obj", "request"), "run a search around a base request"),
    Hook("server", f"{CHAT}._convert_to_internal_request", "after", "specgen_engine.controller.hooks:note_chat_request",
         ("self", "request", "raw_request"), "tell the controller which requests came from the chat route, and their messages"),
    Hook("server", f"{CHAT}._build_chat_response", "around", "specgen_engine.controller.hooks:build_chat_response",
         ("self", "request", "ret", "created"), "sglext.specgen of a plain answer"),
    Hook("server", f"{CHAT}._generate_chat_stream", "around", "specgen_engine.controller.hooks:generate_chat_stream",
         ("self", "adapted_request", "request", "raw_request"), "sglext.specgen in a last chunk of a streamed answer"),
    Hook("scheduler", f"{SCHEDULER}.init_request_dispatcher", "after", "specgen_engine.scheduler.hooks:attach",
         ("self",), "create the scheduler extension; route control messages to it"),
    Hook("scheduler", f"{SCHEDULER}.get_init_info", "after", "specgen_engine.scheduler.hooks:init_info",
         ("self",), "report the hooks to the parent process"),
    Hook("scheduler", f"{SCHEDULER}.run_batch", "before", "specgen_engine.scheduler.hooks:run_batch",
         ("self", "batch", "pp_proxy_tensors"), "the engine stands still while a candidate is timed on its GPU"),
    Hook("scheduler", f"{SCHEDULER}.on_idle", "before", "specgen_engine.scheduler.hooks:on_idle",
         ("self",), "an idle engine is in no timed run's way"),
    Hook("scheduler", f"{SCHEDULER}.process_batch_result", "after", "specgen_engine.scheduler.hooks:process_batch_result",
         ("self", "batch", "result"), "token-level triggers; fork points at the step that decodes them"),
    Hook("scheduler", f"{SCHEDULER}._get_new_batch_prefill_raw", "around", "specgen_engine.scheduler.hooks:get_new_batch_prefill",
         ("self", "prefill_delayer_single_pass", "running_batch"), "forks are admitted only behind ordinary requests"),
    Hook("scheduler", f"{SCHEDULER}._get_new_batch_prefill_raw", "after", "specgen_engine.tier.hooks:prefetch",
         ("self", "prefill_delayer_single_pass", "running_batch"), "prefixes of waiting requests come from the remote KV tier"),
    Hook("scheduler", f"{SCHEDULER}.update_running_batch", "around", "specgen_engine.scheduler.hooks:update_running_batch",
         ("self", "batch"), "forks give their KV back before SGLang retracts anyone"),
    Hook("scheduler", f"{SCHEDULER}._add_request_to_queue", "after", "specgen_engine.scheduler.hooks:queued",
         ("self", "req", "is_retracted"), "count what is retracted"),
    Hook("scheduler", "sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order", "after",
         "specgen_engine.scheduler.hooks:retraction_order", ("reqs", "server_args"), "forks are retracted first"),
    Hook("scheduler", "sglang.srt.mem_cache.registry.default_radix_cache_factory", "around", "specgen_engine.tier.hooks:radix_cache",
         ("ctx",), "the radix cache over lent memory, with --specgen-kv peer or loopback"),
    Hook("scheduler", f"{SCHEDULER}.init_model_worker", "after", "specgen_engine.tier.hooks:remember_draft", ("self",),
         "the draft's KV pool, for the radix cache over lent memory"),
    Hook("scheduler", "sglang.srt.mem_cache.kv_cache_builder.maybe_register_hicache_draft", "around",
         "specgen_engine.tier.hooks:register_draft",
         ("tree_cache", "draft_worker", "spec_algorithm", "server_args", "enable_hierarchical_cache", "page_size"),
         "a remote KV tier keeps a draft's KV in its own pages"),
    Hook("scheduler", f"{SCHEDULER}.get_internal_state", "after", "specgen_engine.tier.hooks:internal_state",
         ("self", "recv_req"), "the remote KV tier's counts and books in /server_info"),
    Hook("scheduler", f"{SCHEDULER}.get_internal_state", "after", "specgen_engine.scheduler.hooks:internal_state",
         ("self", "recv_req"), "retracted requests, free KV and remembered searches in /server_info"),
    Hook("scheduler", "sglang.kernels.ops.layernorm.mhc.hc_split_sinkhorn", "around", "specgen_engine.models.mhc:hc_split_sinkhorn",
         ("mixes", "hc_scale", "hc_base", "hc_mult", "sinkhorn_iters", "eps"), "DeepSeek-V4 where TileLang is not installed"),
    Hook("scheduler", "sglang.srt.model_loader.weight_utils.initialize_dummy_weights", "around", "specgen_engine.models.weights:initialize",
         ("model", "low", "high", "seed"), "random weights that comparisons can rest on, with SPECGEN_DUMMY_WEIGHTS=scaled"),
    Hook("scheduler", "sglang.srt.model_executor.model_runner.ModelRunner.sample", "after", "specgen_engine.replay.sampler:sample",
         ("self", "logits_output", "forward_batch"), "replay: recorded ids replace sampled ones where sampling happens"),
)  # fmt: skip


def load() -> None:
    """Entry point. Registers the argument hooks; in a scheduler process of an active server, its hooks too."""
    _register([hook for hook in HOOKS if hook.process == "arguments"])
    if _inside_active_server():
        activate("scheduler")


def activate(process: Process) -> list[str]:
    """Check, register and apply the hooks of a process; returns their targets.

    Raises HookError for a release that is neither tested (versions.py) nor allowed, and when SGLang lacks a target,
    its signature differs, or applying it failed.
    """
    check_release()
    hooks = [hook for hook in HOOKS if hook.process == process]
    problems = [problem for hook in hooks if (problem := fit(hook))]
    if problems:
        raise HookError(f"SpecGen engine does not fit SGLang {sglang_version()}: " + "; ".join(problems))
    _register(hooks)
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    missing = [hook.target for hook in hooks if not is_applied(hook)]
    if missing:
        raise HookError(f"SpecGen engine: SGLang {sglang_version()} did not apply the hooks on {', '.join(missing)}")
    return [hook.target for hook in hooks]


def check_release() -> None:
    """Raises HookError for an untested release, naming the hooks that moved, unless the operator allows it."""
    version = sglang_version()
    if versions.refusal(version, []) is None:
        return
    reason = versions.refusal(version, [problem for hook in HOOKS if (problem := fit(hook))])
    raise HookError(f"--enable-specgen: {reason}")


def targets() -> dict[str, versions.Signature]:
    """All that we take from SGLang by name, hooked or called, with its parameters where nothing moved."""
    return {hook.target: hook.expects for hook in HOOKS} | dict(versions.CALLED)


def mark_active() -> None:
    """Child processes of this one are schedulers of an active server; a pid, so that a stray variable cannot mislead."""
    os.environ[ACTIVE] = str(os.getpid())


def fit(hook: Hook) -> str | None:
    """None when the target exists with the expected parameters, else one line."""
    try:
        function = inspect.unwrap(resolve(hook.target))
    except (ImportError, AttributeError) as error:
        return f"{hook.target} is missing ({error})"
    found = tuple(inspect.signature(function).parameters)
    expects = versions.expected(hook.target, hook.expects, versions.current()) or hook.expects
    if found != expects:
        return f"{hook.target} takes ({', '.join(found)}), expected ({', '.join(expects)})"
    return None


def is_applied(hook: Hook) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return hook.target in HookRegistry._patched and hasattr(resolve(hook.target), "__wrapped__")


def check_hooks() -> list[dict[str, str]]:
    """One row a hook for `specgen doctor` and docs: target, kind, purpose, process, problem (empty when it fits)."""
    return [
        {"target": h.target, "kind": h.kind, "purpose": h.purpose, "process": h.process, "problem": fit(h) or ""}
        for h in HOOKS
    ]


def resolve(target: str) -> Callable[..., Any]:
    """The function behind a dotted path; a classmethod's plain function, so that signatures show cls."""
    owner_path, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    raw = owner.__dict__.get(name) if isinstance(owner, type) else None
    if isinstance(raw, classmethod | staticmethod):
        return raw.__func__
    return getattr(owner, name)


def _register(hooks: list[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, _handler(hook), HookType(hook.kind))


def _handler(hook: Hook) -> Callable[..., Any]:
    """Import the handler's module at its first call: the argument hooks must not cost an import of the engine."""
    module, _, name = hook.handler.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    call.__qualname__ = hook.handler
    return call


def _inside_active_server() -> bool:
    pid = os.environ.get(ACTIVE, "")
    return pid.isdigit() and int(pid) in {parent.pid for parent in psutil.Process().parents()}


def main(arguments: list[str]) -> int:
    """`python -m specgen_engine.plugin --check-wheel [FILE]`: 0 when all fits, 1 when something moved, 2 for bad input."""
    from specgen_engine import signatures

    if not arguments or arguments[0] != "--check-wheel" or len(arguments) > 2:
        print(f"usage: {main.__doc__}", file=sys.stderr)
        return 2
    try:
        report = signatures.check(Path(arguments[1]) if len(arguments) == 2 else None, targets())
    except SpecGenError as error:
        print(f"specgen: {error}", file=sys.stderr)
        return 2
    print("\n".join(signatures.lines_of(report)))
    return 1 if report.moved else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

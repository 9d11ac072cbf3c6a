"""Configuration: one pydantic model, read from TOML and --specgen-* flags.

Absent means default; present but wrong is an error naming the key, its line and the remedy, never the default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from specgen_engine.controller.termination import parse_termination
from specgen_engine.controller.thinking import style_of
from specgen_engine.controller.triggers import parse_trigger
from specgen_engine.errors import ConfigError
from specgen_engine.replay.trace import load_traces


def _trigger_spec(spec: str) -> str:
    parse_trigger(spec)
    return spec


def _termination_spec(spec: str) -> str:
    parse_termination(spec)
    return spec


def _thinking_spec(spec: str) -> str:
    if spec != "auto":
        style_of(None, None, spec)
    return spec


ThinkingSpec = Annotated[str, Field(max_length=500), AfterValidator(_thinking_spec)]
TriggerSpec = Annotated[str, Field(max_length=500), AfterValidator(_trigger_spec)]
TerminationSpec = Annotated[str, Field(max_length=500), AfterValidator(_termination_spec)]


class Section(BaseModel):
    """Unknown keys and numbers without end are errors; values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ForkConfig(Section):
    nudge: str = Field(default="", description="text after the closed thinking that a fork starts its answer with")
    temperature: float | None = Field(
        None, ge=0, le=2, description="sampling temperature of forks; default: the base request's"
    )
    max_tokens: int = Field(default=2048, ge=1, description="cap on the tokens of one fork")
    per_search: int = Field(default=4, ge=1, description="forks in flight for one search")
    end_repeats: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="end forks that write an earlier answer again, a new kernel being worth so many times what one has "
        "cost so far, 0: every repeat (default: none is ended)",
    )
    feedback: bool = Field(default=False, description="tell a fork of the search's last failed candidate's error")
    total: int = Field(default=16, ge=1, description="forks in flight on this server")


class SchedulerConfig(Section):
    batch_share: float = Field(
        default=0.5, gt=0, le=1, description="largest share of the running batch that forks may take"
    )
    base_share: float = Field(
        default=1.0, gt=0, le=1, description="share of decode steps that a base takes part in while forks of it decode"
    )
    headroom: float = Field(
        default=0.05, ge=0, lt=1, description="share of the KV pool that admitting a fork must leave free"
    )


class EvaluationConfig(Section):
    workers: int = Field(default=1, ge=1, description="candidates evaluated at once on each device")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?(,cuda:\d+)*|ray:[^:\s]+:\d+)$",
        description="auto, cpu, cuda:N, several GPUs as cuda:1,cuda:2, or a shared pool as ray:HOST:PORT",
    )
    compile_s: float = Field(
        default=180, gt=0, description="seconds that import, construction and weights of a candidate may take, each"
    )
    check_s: float = Field(
        default=30, gt=0, description="seconds a candidate may take for one call in the correctness check"
    )
    time_s: float = Field(default=30, gt=0, description="seconds the timing may take")
    task_s: float = Field(default=60, gt=0, description="seconds the task's reference may take for one set of inputs")
    pause: float | None = Field(
        default=None, ge=0, lt=1,
        description="largest share of time that an engine stands still while candidates are timed on its device, 0: "
        "never (default: 0.5 on a GPU, 0 on a CPU)",
    )  # fmt: skip
    memory_gb: float = Field(default=8, gt=0, description="memory a candidate's process may take, in GiB")
    cache: Path | None = Field(
        default=None, description="folder of compiled candidates (default: SPECGEN_CACHE/builds)"
    )
    sandbox: Literal["auto", "require", "off"] = Field(
        "auto", description="isolation of candidates; require refuses a host without kernel isolation"
    )
    profile: Literal["off", "auto", "ncu", "nsys", "cupti", "torch.profiler"] = Field(
        "off", description="profile every correct candidate behind its verdict, auto: by the best tool here"
    )


class KvConfig(Section):
    tier: Literal["peer", "loopback", "host", "off"] = Field(
        "off",
        description="second level of the KV cache: peer GPUs' lent memory, loopback (shared memory), host, or off",
    )
    fallback: Literal["refuse", "host", "off"] = Field(
        "refuse", description="what to do at start when no lender is usable"
    )
    directory: Path | None = Field(
        default=None, description="folder of the lenders' sockets (default: specgen-kv-UID in the temporary folder)"
    )
    chunk_mib: int = Field(default=64, ge=1, description="size of a lent chunk in MiB, the same for all lenders")
    max_chunks: int | None = Field(
        default=None, ge=1, le=4096, description="chunks borrowed at most by a rank (default: its share of all)"
    )
    sms: int = Field(default=16, ge=1, le=132, description="SMs that a transfer may occupy")

    @property
    def socket_directory(self) -> Path:
        return self.directory or Path(tempfile.gettempdir()) / f"specgen-kv-{os.geteuid()}"


class TaskConfig(Section):
    source: Literal["explicit", "prompt"] = Field(
        "explicit", description="prompt: also take a task from a fenced module in the prompt"
    )
    roots: tuple[Path, ...] = Field(default=(), description="folders that task paths in requests may point into")


class SpecGenConfig(Section):
    """Everything an operator can set. A request may narrow trigger, termination and fork within it."""

    trigger: TriggerSpec = Field(
        default="paragraph:min=800",
        description="when to fork: every:N, paragraph, fence, transition, draft, entropy:H, adaptive, :min=N and "
        ":new=code behind each, joined by +",
    )
    termination: TerminationSpec = Field(
        "gain:0.3",
        description="when to end the reasoning: gain:R, plateau:K, speedup:X, roofline:X, best_of:K, correct, "
        "budget:seconds=S,tokens=T,gpu_seconds=G, several joined by |, or none",
    )
    thinking: ThinkingSpec = Field(
        "auto", description="how the model marks its reasoning: auto, a style's name, or OPEN...CLOSE"
    )
    grace_s: float = Field(
        30,
        ge=0,
        description="seconds that verdicts are awaited once the base has answered by itself (a fortieth of the time so "
        "far once that answer is known to be right), and ten times as many more for the verdict on that answer, three "
        "times where a faster kernel is there",
    )
    fork: ForkConfig = Field(default_factory=ForkConfig)
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tasks: TaskConfig = Field(default_factory=TaskConfig)
    kv: KvConfig = Field(default_factory=KvConfig)
    replay: tuple[Path, ...] = Field(default=(), description="trace folders; recorded ids replace sampled ones")
    adaptive_state: Path | None = Field(
        default=None, description="file in which the adaptive trigger keeps what it has learnt (default: in memory)"
    )
    history: int = Field(default=256, ge=1, description="finished searches kept for GET /specgen/searches")
    allow_untrusted: bool = Field(
        default=False, description="take tasks from prompts even where anyone can reach the server without an API key"
    )


def leaves(
    model: type[BaseModel] = SpecGenConfig, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, field) of every settable value."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaves(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name), info


def flag_of(path: tuple[str, ...]) -> str:
    """By the path, but for two that operators type most."""
    short: dict[tuple[str, ...], str] = {
        ("tasks", "source"): "--specgen-tasks",
        ("evaluation", "sandbox"): "--specgen-sandbox",
        ("kv", "tier"): "--specgen-kv",
    }
    return short.get(path) or "--specgen-" + "-".join(path).replace("_", "-")


def markdown_table() -> str:
    """Every setting with its default and meaning: the table of docs/settings.md, which a test holds to it."""
    rows = ["| flag | default | what it sets |", "|---|---|---|"]
    for path, info in leaves():
        value = info.get_default(call_default_factory=True)
        default = "" if value in (None, "", ()) or value is False else f"`{value}`"
        rows.append(f"| `{flag_of(path)}` | {default} | {(info.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag, the file and one override a leaf; all absent by default, so that absence can be told from a value."""
    group = parser.add_argument_group("SpecGen engine")
    group.add_argument("--enable-specgen", action="store_true", help="fork kernels out of running reasoning")
    group.add_argument("--specgen-config", type=Path, metavar="FILE", help="TOML file with the settings below")
    for path, info in leaves():
        many = get_origin(info.annotation) is tuple
        default = info.get_default(call_default_factory=True)
        if info.annotation is bool:
            group.add_argument(
                flag_of(path), dest="specgen__" + "__".join(path), default=argparse.SUPPRESS, action="store_true",
                help=f"{info.description} (default: {default!r})",
            )  # fmt: skip
            continue
        group.add_argument(
            flag_of(path),
            dest="specgen__" + "__".join(path),
            default=argparse.SUPPRESS,
            nargs="+" if many else None,
            metavar="DIR" if many else path[-1].upper(),
            help=f"{info.description} (default: {default!r})".replace("%", "%%"),
        )


def from_arguments(args: argparse.Namespace) -> SpecGenConfig:
    """Merge the file and the overrides.

    Raises ConfigError naming the key, the file and line or the flag, and what is expected.
    """
    file: Path | None = getattr(args, "specgen_config", None)
    tree, text = _read(file) if file else ({}, "")
    _check_types(tree, file, text)
    from_flags: dict[tuple[str, ...], Any] = {}
    for path, _info in leaves():
        dest = "specgen__" + "__".join(path)
        if hasattr(args, dest):
            from_flags[path] = getattr(args, dest)
            _put(tree, path, getattr(args, dest))
    try:
        settings = SpecGenConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, file, text, from_flags)) from None
    _check_folders(settings, lambda path: _where(path, file, text, from_flags))
    return settings


def _check_types(tree: dict[str, Any], file: Path | None, text: str) -> None:
    """TOML has types, so a number in quotes is an error there; a flag is text and is converted."""
    try:
        SpecGenConfig.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, file, text, {})) from None


def _check_folders(settings: SpecGenConfig, where: Callable[[tuple[str, ...]], str]) -> None:
    """What the server would trip over once its engine is up: traces that are not whole, roots that are not there."""
    try:
        if settings.replay:
            load_traces(settings.replay)
    except ValueError as error:
        raise ConfigError(f"{where(('replay',))}: {error}") from None
    for root in settings.tasks.roots:
        if not root.is_dir():
            raise ConfigError(f"{where(('tasks', 'roots'))}: {root} is no folder; name one that exists")


def _read(file: Path) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--specgen-config {file}: cannot be read ({error}); give a readable UTF-8 TOML file"
        ) from None
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--specgen-config {file}: not TOML: {error}") from None


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """The tree's tables are tables: _check_types has seen it."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _explain(error: ValidationError, file: Path | None, text: str, flags: dict[tuple[str, ...], Any]) -> str:
    lines = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        lines.append(f"{_where(path, file, text, flags)}: {item['msg']} (got {item['input']!r:.200})")
    return "; ".join(lines)


def _where(path: tuple[str, ...], file: Path | None, text: str, flags: dict[tuple[str, ...], Any]) -> str:
    """The flag that set a key, else file, line and key."""
    known = next((flag for flag in flags if path[: len(flag)] == flag), None)
    return flag_of(known) if known else f"--specgen-config {file}:{_line_of(text, path)}: {'.'.join(path)}"


def _line_of(text: str, path: tuple[str, ...]) -> int:
    """Line of a key in TOML text; tomllib keeps no positions."""
    table, names = "", [part for part in path if not part.isdigit()]
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = header.group(1).strip()
            if table == ".".join(names):
                return number
        elif key := re.match(r"\s*([\w.\-\"']+)\s*=", line):
            full = [*(table.split(".") if table else []), *key.group(1).replace('"', "").split(".")]
            if full == names[: len(full)]:
                return number
    return 1

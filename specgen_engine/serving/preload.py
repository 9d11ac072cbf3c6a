"""Servers in seconds instead of a minute, for tests: one process imports SGLang once and forks every server from it.

A CPU server spends most of its start-up in three processes that each import SGLang for some 22 s of processor time.
Here one template process does so and then forks; the server forks its scheduler and detokenizer in turn (SGLang asks
for spawn). What runs is SGLang's own launch_server with its own processes, messages and HTTP server. Tokenizers are
read before the fork, once a model: a server's three processes would read them four times, 11 s of two busy cores. Not
for production: forked children share what was imported, so the environment variables that are read at import must be
those of the template.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specgen_engine.errors import SpecGenError
from specgen_engine.serving.cpu import option_value

# Read while SGLang or Triton is imported: a server that wants another value needs another template.
IMPORT_TIME_VARIABLES = ("SGLANG_USE_CPU_ENGINE", "TRITON_INTERPRET", "PYTHONPATH")

IMPORTS = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_loader.loader",
    "sglang.srt.models.llama",
    "sglang.srt.layers.attention.torch_native_backend",
    "openai",
    "pybase64",
)
IMPORT_FOLDERS = ("sglang.srt.multimodal.processors", "sglang.srt.function_call", "sglang.srt.parser")

# Modules that ask for pinned host memory, which torch has not without a GPU's driver.
PINNING = ("sglang.srt.lora.layers", "sglang.srt.lora.backend.torch_backend")


class Template:
    """The template process; `start` forks one server. Close it (or leave its `with`) when no server is needed any more.

    Servers are not the template's children to look after: end them by their process id (and tree) like any other
    server.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, modules: Sequence[str] = ()) -> None:
        """Starts importing and returns; the first `start` waits for it. `log` gets the template's own output.

        `modules` are imported last: stand-ins for what SGLang can't do on this machine.
        """
        self._environment = dict(environment)
        self._ours, theirs = socket.socketpair()
        self._log = log
        with log.open("ab") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "specgen_engine.serving.preload", str(theirs.fileno()), *modules],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._lines = self._ours.makefile("rw", encoding="utf-8")

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, timeout_s: float = 300) -> int:
        """Fork `launch_server ARGUMENTS`; returns the id of its process, which leads a session of its own.

        Raises SpecGenError when a variable that is read at import differs from the template's, or the template is gone.
        """
        for name in IMPORT_TIME_VARIABLES:
            wanted, had = environment.get(name), self._environment.get(name)
            if wanted != had:
                raise SpecGenError(f"{name}: {wanted!r} here, {had!r} when SGLang was imported: use another template")
        order = {"arguments": list(arguments), "environment": dict(environment), "log": str(log.resolve())}
        self._ours.settimeout(timeout_s)
        try:
            self._lines.write(json.dumps(order) + "\n")
            self._lines.flush()
            answer = self._lines.readline()
        except OSError as error:
            raise SpecGenError(f"the template process does not answer ({error}); its log is {self._log}") from None
        if not answer:
            raise SpecGenError(f"the template process ended; its log is {self._log}")
        return int(json.loads(answer)["pid"])

    def close(self) -> None:
        """End the template; servers that it forked live on."""
        with contextlib.suppress(OSError):  # what was not sent can't be, when the template is gone
            self._lines.close()
        self._ours.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _import_all() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    for folder in IMPORT_FOLDERS:
        package = importlib.import_module(folder)
        for module in pkgutil.iter_modules(package.__path__, f"{folder}."):
            try:
                importlib.import_module(module.name)
            except Exception as error:  # as SGLang does: one optional processor less
                print(f"preload: {module.name}: {error}", flush=True)


def _pin_nothing() -> None:
    """SGLang's LoRA copies to the device from pinned memory, on the CPU engine too: there it gets ordinary memory."""
    import torch

    class Unpinned:
        """torch, as far as these modules use it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def tensor(self, *args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return torch.tensor(*args, **options)

        def zeros(self, *args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            return torch.zeros(*args, **options)

    for name in PINNING:
        vars(importlib.import_module(name))["torch"] = Unpinned()
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign,assignment,misc]


class Tokenizers:
    """SGLang's get_tokenizer, which remembers what it was asked for; a server's processes inherit what is known."""

    def __init__(self) -> None:
        self._read = importlib.import_module("sglang.srt.utils.hf_transformers_utils").get_tokenizer
        self._known: dict[str, Any] = {}
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            if names.get("get_tokenizer") is self._read:
                names["get_tokenizer"] = self.get

    def get(self, name: str, *args: Any, **options: Any) -> Any:
        key = repr((name, args, sorted(options.items())))
        if key not in self._known:
            self._known[key] = self._read(name, *args, **options)
        return self._known[key]

    def expect(self, arguments: Sequence[str]) -> None:
        """Read what a server with these arguments asks for; one that can't be read is left to the server's message."""
        folder = option_value(arguments, "--tokenizer-path") or option_value(arguments, "--model-path")
        if folder is None:
            return
        with contextlib.suppress(Exception):
            self.get(
                folder, tokenizer_mode="auto", trust_remote_code=False, revision=None, tokenizer_backend="huggingface"
            )


def _serve_orders(control: socket.socket, expect: Callable[[Sequence[str]], None]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with control.makefile("rw", encoding="utf-8") as lines:
        for line in lines:
            order = json.loads(line)
            expect(order["arguments"])
            pid = os.fork()
            if pid == 0:
                _become_server(control, order)
            lines.write(json.dumps({"pid": pid}) + "\n")
            lines.flush()


def _become_server(control: socket.socket, order: dict[str, Any]) -> None:
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(control.fileno())
        os.environ.clear()
        os.environ.update(order["environment"])
        _fork_instead_of_spawn()
        _launch(order["arguments"])
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _fork_instead_of_spawn() -> None:
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=True)  # type: ignore[assignment]


def _launch(arguments: list[str]) -> None:
    """What `python -m sglang.launch_server` does, step by step (sglang/launch_server.py)."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    sys.argv = ["sglang.launch_server", *arguments]
    load_plugins()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    control = socket.socket(fileno=int(sys.argv[1]))
    _import_all()
    _pin_nothing()
    for module in sys.argv[2:]:
        importlib.import_module(module)
    _serve_orders(control, Tokenizers().expect)

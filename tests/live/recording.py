"""A small trace, written for these tests: its answers are Python alone, so a verdict takes seconds, not a build."""

from __future__ import annotations

from pathlib import Path

TASK = '''import torch


class Model(torch.nn.Module):
    """Softmax, row by row."""

    def forward(self, x):
        return torch.stack([torch.softmax(row, -1) for row in x])


def get_inputs():
    return [torch.randn(256, 256)]


def get_init_inputs():
    return []
'''
STEPS = 400
MARKS = {1: 8, 2: 24, 3: 40, 4: 56}
MODULE = """import torch
{top}

class ModelNew(torch.nn.Module):
    def forward(self, x):
        return {result}
"""

# What code of a client or a model may want; {secret} and {log} are the server's, outside any scratch folder.
REACH = """
import os, sys
import _socket

def _seen():
    names = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            names.append(open("/proc/" + pid + "/cmdline", "rb").read())
        except OSError:
            pass
    return any(b"sglang" in name or b"serving.preload" in name for name in names)

def _try(name, action):
    try:
        return name if action() is not False else ""
    except OSError:
        return ""

_found = [
    _try("read", lambda: open({secret!r}).read()),
    _try("socket", lambda: _socket.socket(_socket.AF_INET)),
    _try("processes", _seen),
    _try("write", lambda: open({log!r}, "a")),
    _try("signal", lambda: os.kill({pid}, 0)),
    _try("scratch", lambda: open("own.txt", "w")),
]
raise LookupError("reaches=" + ",".join(filter(None, _found)) + " pid=" + str(os.getpid())
                  + " ns=" + os.readlink("/proc/self/ns/pid") + " server=" + str("sglang" in sys.modules))
"""


def answer(top: str = "", result: str = "torch.softmax(x, -1)") -> str:
    return f"A kernel.\n\n```python\n{MODULE.format(top=top, result=result)}```\n"


def reach(secret: Path, log: Path, pid: int) -> str:
    """Statements that end in an error which says what they reached, and from which process."""
    return REACH.format(secret=str(secret), log=str(log), pid=pid)


def write_trace(folder: Path, hostile: str) -> Path:
    """task.py and one iteration: fork 1 wrong, 2 does not compile, 3 hostile, 4 the faster kernel that ends it."""
    iteration = folder / "iter-1"
    iteration.mkdir(parents=True)
    (folder / "task.py").write_text(TASK)
    lines = []
    for step in range(1, STEPS + 1):
        lines += [f"[[fork {fork}]]" for fork, at in MARKS.items() if at == step]
        lines.append(f"Step {step}: the rows are independent, so row {step} could be done with the others at once.\n")
    (iteration / "reasoning.md").write_text("\n".join(lines) + "\n")
    (iteration / "fork-1.md").write_text(answer(result="x"))
    (iteration / "fork-2.md").write_text(answer(top="def broken(:"))
    (iteration / "fork-3.md").write_text(answer(top=hostile))
    (iteration / "fork-4.md").write_text(answer())
    (iteration / "final.md").write_text(answer(top="FINAL = 1"))
    return folder

"""A server's end: nothing of its tree runs any more, and nobody waits longer than for that."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from specgen_engine.serving.process import kill_tree

# As SGLang does it: the child ends at SIGTERM and is not reaped, the parent is busy with what it takes for a crash.
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def started(program: str) -> tuple[psutil.Process, psutil.Process]:
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    return psutil.Process(parent.pid), psutil.Process(int(parent.stdout.readline()))


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_parent_that_does_not_heed_sigterm_is_killed_after_the_grace() -> None:
    family = started(DEAF)
    began = time.monotonic()
    kill_tree(family[0], grace_s=0.5, patience_s=60)
    assert 0.5 <= time.monotonic() - began < 30
    assert not any(map(runs, family))


def test_a_tree_that_ends_at_sigterm_is_not_waited_for() -> None:
    family = started(DEAF.replace("lambda *_: time.sleep(60)", "signal.SIG_DFL"))
    began = time.monotonic()
    kill_tree(family[0], grace_s=60, patience_s=60)
    assert time.monotonic() - began < 30
    assert not any(map(runs, family))


def test_zombies_that_nobody_reaps_are_not_waited_for() -> None:
    above, child = started(DEAF.replace("time; time.sleep(60)", "os, time; os.setsid(); time.sleep(60)"))
    began = time.monotonic()
    kill_tree(child, grace_s=60, patience_s=60)
    assert time.monotonic() - began < 30
    assert child.status() == psutil.STATUS_ZOMBIE
    kill_tree(above, grace_s=0)


SERVES = """
import subprocess, sys, time
from pathlib import Path
from specgen_engine.serving import process

def sleeper(arguments, log, environment):
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print(started.pid, flush=True)
    return started.pid

process._launch, process._wait_healthy = sleeper, lambda *_: None
with process.running_server([], Path(sys.argv[1])):
    print("up", flush=True)
    time.sleep(60)
"""


def test_a_server_ends_with_who_started_it_and_is_told_to_end(tmp_path: Path) -> None:
    """`timeout 60 specgen replay ...` sends SIGTERM to the one that waits, not to the server in its own session."""
    command = [sys.executable, "-c", SERVES, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "up\n"
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(timeout=30) == 143
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE

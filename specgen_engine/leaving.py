"""Leaving on SIGTERM as on an error: what was started is ended, what was made is removed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwound_on_sigterm() -> Iterator[None]:
    """SIGTERM, which `timeout` and service managers send, raises SystemExit(143) in here.

    By default it ends a process where it stands: the server of a replay, in a session of its own, went on for ever.
    Nothing in a thread or where somebody else has the signal.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

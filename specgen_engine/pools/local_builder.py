"""The process that builds C++ candidates on this machine, for all its workers: their cache is one."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from .base import Built, NoBuilder, Work
from .local_process import LINE_BYTES, bury, read_messages, start_process

if TYPE_CHECKING:
    from .local import LocalBackend

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""Lives in a row without an answer, after which the workers build."""


class BuilderProcess:
    """Started with the first build, or by start(). One that dies is started again; its builds go to the workers."""

    def __init__(self, backend: LocalBackend) -> None:
        self.backend = backend
        self.process: subprocess.Popen[bytes] | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.works: dict[str, Work] = {}
        self.failures = 0
        self.tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        if not self.tasks:
            self.tasks.append(asyncio.get_running_loop().create_task(self._run()))

    def build(self, work: Work) -> None:
        self.start()
        self.works[work.job] = work
        self._send(work.message())

    def cancel(self, job: str) -> None:
        if self.writer is not None:
            self._send({"op": "cancel", "job": job})
        else:
            self._done(job, None, learnt=False)  # it is not up yet

    async def _run(self) -> None:
        while not self.backend.closing:
            await self._life()
            if self.backend.closing:
                return
            self.failures += 1
            code = self.process.returncode if self.process else None
            log.warning("pool: the builder ended with code %s; workers go on with its %d builds", code, len(self.works))
            if self.failures >= MOST_FAILURES:
                self.works.clear()
                self.backend.tell(NoBuilder(f"their builder ended {self.failures} times, with code {code} at last"))
                return
            for job in list(self.works):
                self._done(job, None, learnt=False)
            await anyio.sleep(0.5 * self.failures)

    async def _life(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        backend = self.backend
        device = backend.places[0].device
        try:
            process, scratch = await anyio.to_thread.run_sync(
                start_process, theirs, device, backend.cache, backend.limits, backend.log, "build"
            )
        finally:
            theirs.close()
        self.process = process
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        for work in self.works.values():
            writer.write(_line(work.message()))
        self.writer = writer
        try:
            await read_messages(reader, self._take)
        finally:
            self.writer = None
            writer.close()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(bury, process, scratch)

    def _take(self, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._done(message["job"], message, learnt=False)
        elif "built" in message:
            self.failures = 0
            self._done(message["job"], None, learnt=message["built"] and not message["cached"])
        elif "fatal" in message:
            self.failures = MOST_FAILURES

    def _done(self, job: str, message: dict[str, Any] | None, *, learnt: bool) -> None:
        if self.works.pop(job, None) is not None:
            self.backend.tell(Built(job, message, learnt))

    def _send(self, message: dict[str, object]) -> None:
        """Before it is up, work waits in works."""
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(_line(message))


def _line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"

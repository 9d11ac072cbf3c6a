"""The /specgen routes of a fake controller on a real HTTP server, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from sglang.srt.utils.auth import add_api_key_middleware

from specgen_engine.controller.controller import Controller
from specgen_engine.controller.http import add_routes
from specgen_engine.serving.process import free_port


def app_of(controller: Controller, heartbeat_s: float = 15.0, **keys: Any) -> FastAPI:
    """As SGLang's server has them; keys: api_key and admin_api_key, behind SGLang's own middleware."""
    app = FastAPI()
    add_routes(app, controller, heartbeat_s)
    if keys:
        add_api_key_middleware(app, **{"api_key": None, "admin_api_key": None, **keys})
    return app


@dataclass
class Site:
    url: str
    controller: Controller
    loop: asyncio.AbstractEventLoop

    def call(self, action: Callable[[], Any]) -> Any:
        """Run something on the server's event loop."""
        done: Any = asyncio.run_coroutine_threadsafe(_call(action), self.loop)
        return done.result(10)

    def publish(self, *numbers: int) -> None:
        for number in numbers:
            self.call(lambda n=number: self.controller.feed.publish("progress", {"search": "a", "t": n, "n": n}))


async def _call(action: Callable[[], Any]) -> Any:
    return action()


@contextmanager
def running_site(controller: Controller, **options: Any) -> Iterator[Site]:
    port = free_port()
    loops: list[asyncio.AbstractEventLoop] = []
    config = uvicorn.Config(app_of(controller, **options), port=port, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    for _ in range(500):
        if server.started:
            break
        time.sleep(0.02)
    assert server.started
    try:
        yield Site(f"http://127.0.0.1:{port}", controller, loops[0])
    finally:
        server.should_exit = True
        thread.join(10)

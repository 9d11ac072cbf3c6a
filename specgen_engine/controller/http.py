"""/specgen/* on SGLang's own app, behind its API keys: searches, their events, the live page, an OpenAPI description.

What shows or moves everybody's searches asks for the admin key where the server has one (SGLang's ADMIN_OPTIONAL, as
/flush_cache does); what concerns one search, whose id its client knows, asks for the API key like /v1/chat/completions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, HTTPException, Query
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, StreamingResponse
from sglang.srt.utils.auth import AuthLevel, auth_level

from specgen_engine import __version__
from specgen_engine.controller.controller import Controller
from specgen_engine.controller.schemas import Forked, Problem, Searches, SearchView
from specgen_engine.observability.feed import HEARTBEAT_S, sse

READERS = 64
ENDED_SHOWN = 20
RETRY_MS = 2000
# The page draws from this server only, and nothing that a search says can load or run anything.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
EVENT_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
Responses = dict[int | str, dict[str, Any]]


def _refusals(*codes: int) -> Responses:
    return {code: {"model": Problem} for code in (400, *codes)}


def add_routes(app: FastAPI, controller: Controller, heartbeat_s: float = HEARTBEAT_S) -> None:
    """Put the routes themselves into the app: SGLang's middleware can't see the auth level of one inside a router."""
    app.router.routes.extend(router_of(controller, heartbeat_s).routes)


def router_of(controller: Controller, heartbeat_s: float = HEARTBEAT_S) -> APIRouter:
    """All routes. heartbeat_s: seconds without an event after which a comment keeps a connection alive."""
    router = APIRouter(prefix="/specgen", tags=["specgen"])
    _add_searches(router, controller)
    _add_events(router, controller, heartbeat_s)
    _add_page(router)
    return router


def _add_searches(router: APIRouter, controller: Controller) -> None:
    @router.get("/searches", responses={200: {"model": Searches}, **_refusals()})
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def searches() -> dict[str, Any]:
        """Every search that runs or is remembered, newest last, without its forks and candidates."""
        rows = [record.to_dict() for record in controller.records()]
        for row in rows:
            row["forks"], row["candidates"] = len(row["forks"]), len(row["candidates"])
        return {
            "searches": rows,
            "pool": controller.pool().snapshot(),
            "prompt_tasks_refused": controller.prompt_tasks_refused,
        }

    @router.get("/searches/{search}", responses={200: {"model": SearchView}, **_refusals(404)})
    async def search(search: str, ids: bool = False) -> dict[str, Any]:
        """One search whole; with ids=true also the token ids of its base and its forks."""
        record = controller.record(search)
        if record is None:
            raise HTTPException(404, f"no search {search!r}; GET /specgen/searches lists those remembered")
        return {**record.to_dict(), "ids": record.ids.to_dict()} if ids else record.to_dict()

    @router.post("/searches/{search}/fork", responses={200: {"model": Forked}, **_refusals(404, 409)})
    async def fork(search: str) -> dict[str, Any]:
        """Fork a running search where it is now, whatever its trigger says."""
        session = controller.sessions.get(search)
        if session is None:
            raise HTTPException(404, f"no search {search!r} runs; GET /specgen/searches lists those remembered")
        try:
            return {"search": search, "length": session.ask_for_fork()}
        except ValueError as error:
            raise HTTPException(409, str(error)) from None


def _add_events(router: APIRouter, controller: Controller, heartbeat_s: float) -> None:
    feed = controller.feed

    @router.get("/events", response_class=StreamingResponse, responses={200: EVENT_STREAM, **_refusals(429)})
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def events(
        follow: Annotated[bool, Query(description="false: end after what is known now")] = True,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """Server-sent events: `snapshot`, then started, progress, fork, candidate, stage and ended as they happen.

        With Last-Event-ID only what came after that event, while it is remembered; else a snapshot of every search.
        A reader that falls too far behind gets a snapshot again.
        """
        if follow and feed.readers >= READERS:
            raise HTTPException(429, f"{READERS} readers follow already; close one, or use ?follow=false")
        return StreamingResponse(
            _stream(controller, last_event_id, heartbeat_s if follow else None),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


async def _stream(controller: Controller, last_id: str | None, heartbeat_s: float | None) -> AsyncIterator[str]:
    """heartbeat_s None: end after what is known now."""
    feed = controller.feed
    yield f"retry: {RETRY_MS}\n\n"
    number = feed.after(last_id)
    if number is None:
        number = feed.last
        yield sse("snapshot", snapshot_of(controller), feed.position(number))
    if heartbeat_s is None:
        for event in feed.kept(number):
            yield sse(event.kind, event.data, feed.position(event.number))
        return
    async for item in feed.follow(number, heartbeat_s):
        if item == "idle":
            yield ": alive\n\n"
        elif item == "missed":
            yield sse("snapshot", snapshot_of(controller), feed.position(feed.last))
        else:
            yield sse(item.kind, item.data, feed.position(item.number))


def snapshot_of(controller: Controller) -> dict[str, Any]:
    """What a reader needs who has seen nothing yet: the running searches and the latest others, whole."""
    rows = []
    for record in controller.records():
        session = controller.sessions.get(record.id)
        at = {"t": session.seconds(), "output_tokens": session.output_tokens()} if session is not None else {}
        rows.append({"t": record.wall_s, "output_tokens": record.reasoning_tokens, **record.to_dict(), **at})
    running = [row for row in rows if row["ended_by"] is None]
    ended = [row for row in rows if row["ended_by"] is not None]
    return {"searches": ended[-ENDED_SHOWN:] + running}


def _add_page(router: APIRouter) -> None:
    page = files("specgen_engine.observability").joinpath("live.html").read_text(encoding="utf-8")

    @router.get("/", response_class=HTMLResponse, responses=_refusals())
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def live() -> HTMLResponse:
        """The live view: one page, drawn from /specgen/events."""
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"})

    @router.get("/openapi.json", responses=_refusals())
    async def openapi() -> dict[str, Any]:
        """This description."""
        return describe(router)


def describe(router: APIRouter) -> dict[str, Any]:
    """OpenAPI of these routes alone; SGLang's own is at /openapi.json."""
    return get_openapi(title="SpecGen engine", version=__version__, routes=router.routes)

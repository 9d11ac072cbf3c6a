"""/specgen/searches on SGLang's own app, and so behind its API key: list them, read one, fork one."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException

from specgen_engine.controller.controller import Controller


def router_of(controller: Controller) -> APIRouter:
    router = APIRouter(prefix="/specgen", tags=["specgen"])

    @router.get("/searches")
    async def searches() -> dict[str, Any]:
        """Every search that runs or is remembered, newest last, without its forks and candidates."""
        rows = [record.to_dict() for record in controller.records()]
        for row in rows:
            row["forks"], row["candidates"] = len(row["forks"]), len(row["candidates"])
        return {"searches": rows, "pool": controller.pool().snapshot()}

    @router.get("/searches/{search}")
    async def search(search: str, ids: bool = False) -> dict[str, Any]:
        """One search whole; with ids=true also the token ids of its base and its forks."""
        record = controller.record(search)
        if record is None:
            raise HTTPException(404, f"no search {search!r}; GET /specgen/searches lists those remembered")
        return {**record.to_dict(), "ids": record.ids.to_dict()} if ids else record.to_dict()

    @router.post("/searches/{search}/fork")
    async def fork(search: str) -> dict[str, Any]:
        """Fork a running search where it is now, whatever its trigger says."""
        session = controller.sessions.get(search)
        if session is None:
            raise HTTPException(404, f"no search {search!r} runs; GET /specgen/searches lists those remembered")
        try:
            return {"search": search, "length": session.ask_for_fork()}
        except ValueError as error:
            raise HTTPException(409, str(error)) from None

    return router

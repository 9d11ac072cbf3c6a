"""GET /specgen/searches and /specgen/searches/{id}, on SGLang's own app (and so behind its API key)."""

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
        return {"searches": rows, "pool": (await controller.pool()).snapshot()}

    @router.get("/searches/{search}")
    async def search(search: str) -> dict[str, Any]:
        record = controller.record(search)
        if record is None:
            raise HTTPException(404, f"no search {search!r}; GET /specgen/searches lists those remembered")
        return record.to_dict()

    return router

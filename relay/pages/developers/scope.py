"""One scope that an application offers to others."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.applications import custom_scopes
from relay.pages.browser import go
from relay.pages.developers.frame import HOME, Visit, doing, looking, unknown
from relay.pages.render import PageProblem

router = APIRouter(include_in_schema=False)


def scope_document_of(visit: Visit) -> dict[str, Any]:
    """The document that a scope's form stands for."""
    return {
        "name": visit.text("name"),
        "description": visit.text("description"),
        "scope_suffix": visit.text("scope_suffix"),
        "advertised": visit.ticked("advertised"),
        "allows_refresh_token": visit.ticked("allows_refresh_token"),
        "required_domains": visit.lines("required_domains"),
        "dependent_scopes": [_need_of(line) for line in visit.lines("needs")],
    }


def _need_of(line: str) -> dict[str, Any]:
    """A line of the form: before a scope, a star marks it as optional and a plus as needed while people are away."""
    scope = line.lstrip("*+ ")
    marks = line[: len(line) - len(scope)]
    return {"scope": scope, "optional": "*" in marks, "requires_refresh_token": "+" in marks}


@router.get(HOME + "/scopes/{scope_id}")
async def show_scope_page(request: Request, scope_id: str) -> HTMLResponse:
    """The scope."""
    return await _page(await looking(request), scope_id)


async def _page(visit: Visit, scope_id: str) -> HTMLResponse:
    found = await visit.read(lambda connection, subject: custom_scopes.require(connection, scope_id, subject))
    return visit.page("scope", scope=found)


@router.post(HOME + "/scopes/{scope_id}")
async def change_scope_page(request: Request, scope_id: str) -> Response:
    """Change or delete the scope."""
    visit, deed = await doing(request, "scope")
    if deed not in ("change", "delete"):
        raise unknown()

    def work(connection: Connection, subject: Subject) -> str:
        found = custom_scopes.require(connection, scope_id, subject)
        if deed == "delete":
            custom_scopes.remove(connection, found)
        else:
            custom_scopes.change(connection, found, scope_document_of(visit), subject)
        return f"{HOME}/applications/{found.client_id}"

    try:
        return go(await visit.write(work))
    except PageProblem as problem:
        return await visit.again(problem, lambda: _page(visit, scope_id))

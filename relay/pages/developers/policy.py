"""One policy: what an application demands of how, when and as whom somebody has signed in."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.applications import documents, policies
from relay.pages.browser import go
from relay.pages.developers.frame import HOME, Visit, doing, looking, unknown
from relay.pages.render import PageProblem

router = APIRouter(include_in_schema=False)


def policy_document_of(visit: Visit) -> dict[str, Any]:
    """The document that a policy's form stands for. Raises `ApiError` 400."""
    minutes = visit.text("minutes")
    if minutes is not None and (not minutes.isdecimal() or len(minutes) > 6):
        raise documents.invalid("The time must be a number of minutes.")
    return {
        "display_name": visit.text("display_name"),
        "description": visit.text("description"),
        "high_assurance": minutes is not None,
        "authentication_assurance_timeout": None if minutes is None else int(minutes) * 60,
        "required_mfa": visit.ticked("required_mfa"),
        "domain_constraints_include": visit.lines("include") or None,
        "domain_constraints_exclude": visit.lines("exclude") or None,
    }


@router.get(HOME + "/policies/{policy_id}")
async def show_policy_page(request: Request, policy_id: str) -> HTMLResponse:
    """The policy."""
    return await _page(await looking(request), policy_id)


async def _page(visit: Visit, policy_id: str) -> HTMLResponse:
    found = await visit.read(lambda c, subject: policies.policy_document(policies.require(c, policy_id, subject)))
    return visit.page("policy", policy=found)


@router.post(HOME + "/policies/{policy_id}")
async def change_policy_page(request: Request, policy_id: str) -> Response:
    """Change or delete the policy."""
    visit, deed = await doing(request, "policy")
    if deed not in ("change", "delete"):
        raise unknown()

    def work(connection: Connection, subject: Subject) -> str:
        row = policies.require(connection, policy_id, subject)
        if deed == "delete":
            policies.remove(connection, row.id)
        else:
            policies.change(connection, row, policy_document_of(visit), subject)
        return f"{HOME}/projects/{row.project_id}"

    try:
        return go(await visit.write(work))
    except PageProblem as problem:
        return await visit.again(problem, lambda: _page(visit, policy_id))

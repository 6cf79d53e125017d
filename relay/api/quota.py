"""``GET /towpath/v1/quota``: what the caller may still ask for. Globus has no answer to that."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from sqlalchemy import Connection

from relay.api.bearer import Caller, transfer_caller
from relay.services import services_of
from relay.transfer.task_turns import count_of_owner

router = APIRouter(tags=["Towpath"])


class Counter(BaseModel):
    """``limit`` and ``remaining`` are null where there is no limit; ``period`` in seconds, null for what is held."""

    limit: int | None
    used: int
    remaining: int | None
    period: float | None


class QuotaDocument(BaseModel):
    """Requests of the last period, and tasks that are not over."""

    requests: Counter
    tasks: Counter


@router.get("/towpath/v1/quota")
async def show_quota(request: Request, caller: Caller = Depends(transfer_caller)) -> QuotaDocument:
    """The caller's counters."""
    services = services_of(request)
    wanted = services.settings.limits
    balance = services.requests.balance(caller.identity_id, services.clock())

    def work(connection: Connection) -> int:
        return count_of_owner(connection, caller.identity_id)

    active = await services.store.read(work)
    asked = Counter(limit=None, used=0, remaining=None, period=float(wanted.user_requests_period))
    if balance is not None:
        asked = Counter(
            limit=balance.limit,
            used=balance.limit - balance.remaining,
            remaining=balance.remaining,
            period=float(wanted.user_requests_period),
        )
    most = wanted.user_tasks or None
    left = None if most is None else max(0, most - active)
    return QuotaDocument(requests=asked, tasks=Counter(limit=most, used=active, remaining=left, period=None))

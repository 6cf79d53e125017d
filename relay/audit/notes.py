"""What the code that answers a request tells the audit log about it: who acts, and what the request was about."""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import HTTPConnection
from starlette.types import Scope

from relay.store.database import asking

_KEY: Final = "audit"


def acting(request: HTTPConnection, identity_id: str | None, client_id: str | None = None) -> None:
    """Say in whose name the request is made, once that is proven."""
    told = notes(request.scope)
    told["who"] = identity_id or told.get("who")
    told["client"] = client_id or told.get("client")
    asking.set(told["who"] or told["client"] or asking.get())


def note(request: HTTPConnection, **facts: str) -> None:
    """Add facts, never secrets, to the request's entry. A request with facts is recorded whatever its method is."""
    notes(request.scope).setdefault("facts", {}).update(facts)


def quiet(request: HTTPConnection) -> None:
    """Leave the request out of the log: a repeated question that has changed nothing."""
    notes(request.scope)["quiet"] = True


def notes(scope: Scope) -> dict[str, Any]:
    """All that was told about a request."""
    told: dict[str, Any] = scope.setdefault("state", {}).setdefault(_KEY, {})
    return told

"""Each request of a known person is counted here, once, and its answer says what they have left."""

from __future__ import annotations

import math
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import Scope

from relay.quota.allowance import Allowance, Balance
from relay.refusal import too_many

_KEY: Final = "balance"


def count(request: HTTPConnection, allowance: Allowance, subject: str, now: float) -> None:
    """Count a request of a person. Raises `ApiError` 429 with ``Retry-After`` when they have asked for too much."""
    balance = allowance.take(subject, now)
    if balance is None:
        return
    request.scope.setdefault("state", {})[_KEY] = balance
    if balance.wait:
        seconds = max(1, math.ceil(balance.wait))
        raise too_many(f"You have made more than {balance.limit} requests lately; go on in {seconds} s.", seconds)


def add_headers(scope: Scope, headers: MutableHeaders) -> None:
    """Say in an answer what is left (the header fields of draft-ietf-httpapi-ratelimit-headers, 03)."""
    balance: Balance | None = scope.get("state", {}).get(_KEY)
    if balance is not None:
        headers["RateLimit-Limit"] = str(balance.limit)
        headers["RateLimit-Remaining"] = str(balance.remaining)
        headers["RateLimit-Reset"] = str(balance.reset)

"""Signing in on another device (RFC 8628): a program without a browser shows a short code, a person types it in.

The person sees where the request came from and what it asks for before allowing anything, since the code may have
been sent to them by somebody who wants in (RFC 8628, 5.4).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, delete, func, insert, select, update

from relay.auth.browser_sessions import MAX_TEXT, Authentication
from relay.auth.codes import open_signed_session
from relay.auth.tokens import MAX_TOKEN, token_digest
from relay.store.sign_in_tables import device_codes

# No vowels, so that no words arise; 20 letters to the power of eight.
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
_GROUP = 4
INTERVAL = 5
MAX_INTERVAL = 60
# So many requests of one client wait at a time; more are refused.
MAX_WAITING = 10_000

PollError = Literal["authorization_pending", "slow_down", "access_denied", "expired_token", "invalid_grant"]


@dataclass(frozen=True)
class NewDeviceCode:
    """The two codes at the only moment they exist in the clear."""

    device_code: str
    user_code: str


@dataclass(frozen=True)
class DeviceRequest:
    """A request that waits for a person. Times are Unix seconds."""

    digest: str
    client_id: str
    scope: str
    offline: bool
    address: str
    user_agent: str
    created: float
    expires: float


@dataclass(frozen=True)
class Allowed:
    """A person has allowed the request."""

    session_id: str
    identity_id: str
    scope: str
    offline: bool


def begin(
    connection: Connection,
    client_id: str,
    scope: str,
    *,
    offline: bool,
    address: str,
    user_agent: str,
    now: float,
    life: float,
) -> NewDeviceCode:
    """A new request. The client must have its row already."""
    made = NewDeviceCode(secrets.token_urlsafe(32), _user_code())
    connection.execute(
        insert(device_codes).values(
            digest=token_digest(made.device_code),
            user_code=_user_digest(made.user_code),
            client_id=client_id,
            scope=scope,
            offline=offline,
            address=address[:MAX_TEXT],
            user_agent=user_agent[:MAX_TEXT],
            created=now,
            expires=now + life,
            interval=INTERVAL,
            state="waiting",
        )
    )
    return made


def count_waiting(connection: Connection, now: float) -> int:
    """How many requests wait for somebody."""
    waiting = (device_codes.c.state == "waiting") & (device_codes.c.expires > now)
    return connection.execute(select(func.count()).select_from(device_codes).where(waiting)).scalar_one()


def find_request(connection: Connection, user_code: str, now: float) -> DeviceRequest | None:
    """The waiting request of a code as people type it: small letters, spaces and hyphens do not matter."""
    table = device_codes.c
    row = connection.execute(
        select(device_codes).where(
            table.user_code == _user_digest(user_code), table.state == "waiting", table.expires > now
        )
    ).one_or_none()
    if row is None:
        return None
    return DeviceRequest(
        row.digest, row.client_id, row.scope, row.offline, row.address, row.user_agent, row.created, row.expires
    )


def allow(
    connection: Connection, request: DeviceRequest, identity_id: str, shown: Iterable[Authentication], now: float
) -> bool:
    """Let the program have its tokens; returns whether the request still waited."""
    session_id = open_signed_session(connection, identity_id, request.client_id, shown, now)
    return _settle(connection, request, state="allowed", identity_id=identity_id, session_id=session_id)


def refuse(connection: Connection, request: DeviceRequest) -> bool:
    """Tell the program no; returns whether the request still waited."""
    return _settle(connection, request, state="refused")


def _settle(connection: Connection, request: DeviceRequest, **values: str) -> bool:
    this = (device_codes.c.digest == request.digest) & (device_codes.c.state == "waiting")
    return connection.execute(update(device_codes).where(this).values(values)).rowcount == 1


def poll(connection: Connection, client_id: str, device_code: str, now: float) -> Allowed | PollError:
    """What the program gets when it asks. A code that was allowed is used up. Errors are RFC 8628's, 3.5."""
    if not 1 <= len(device_code) <= MAX_TOKEN:
        return "invalid_grant"
    this = device_codes.c.digest == token_digest(device_code)
    row = connection.execute(select(device_codes).where(this)).one_or_none()
    if row is None or row.client_id != client_id:
        return "invalid_grant"
    if row.expires <= now:
        return "expired_token"
    if row.state == "refused":
        return "access_denied"
    if row.state == "allowed":
        if connection.execute(delete(device_codes).where(this)).rowcount != 1:
            return "invalid_grant"
        return Allowed(row.session_id, row.identity_id, row.scope, row.offline)
    hasty = row.last_polled is not None and now - row.last_polled < row.interval
    interval = min(row.interval + INTERVAL, MAX_INTERVAL) if hasty else row.interval
    connection.execute(update(device_codes).where(this).values(last_polled=now, interval=interval))
    return "slow_down" if hasty else "authorization_pending"


def _user_code() -> str:
    letters = "".join(secrets.choice(_LETTERS) for _ in range(2 * _GROUP))
    return f"{letters[:_GROUP]}-{letters[_GROUP:]}"


def _user_digest(user_code: str) -> str:
    return token_digest("".join(c for c in user_code[:100].upper() if c in _LETTERS))

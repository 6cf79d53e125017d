"""Browser sessions: somebody is signed in at the relay's own pages, known by a cookie.

The cookie holds 256 random bits, the database their SHA-256. A session belongs to a person's primary identity and
remembers which of their identities have shown who they are, when, and how.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from relay.auth.identities import Identity, select_by_ids
from relay.auth.linked import primary_of
from relay.auth.tokens import MAX_TOKEN, token_digest
from relay.store.auth_tables import sessions
from relay.store.sign_in_tables import authentications, browser_sessions, session_authentications

# How stale `last_seen` may be: not every page of a visit needs a write.
_SEEN_EVERY = 300.0
MAX_TEXT = 300
MULTI_FACTOR = "mfa"


@dataclass(frozen=True)
class Authentication:
    """How and when an identity showed who it is. ``methods`` are words of RFC 8176."""

    identity_id: str
    provider_id: str
    authenticated: float
    methods: tuple[str, ...]


@dataclass(frozen=True)
class BrowserSession:
    """A live session. ``identity`` is the person's primary one; ``authentications`` are by identity id."""

    id: str
    identity: Identity
    created: float
    last_seen: float
    expires: float
    address: str
    user_agent: str
    authentications: Mapping[str, Authentication]

    @property
    def authenticated(self) -> float:
        """When somebody last showed who they are in this session."""
        return max((item.authenticated for item in self.authentications.values()), default=self.created)


def open_browser_session(
    connection: Connection,
    shown: Authentication,
    *,
    life: float,
    idle: float,
    address: str,
    user_agent: str,
) -> str:
    """Begin a session for the person behind an identity that has just shown who it is; returns the cookie's value.

    It ends ``life`` seconds from now, and earlier when it is not used for ``idle`` seconds.
    """
    cookie = secrets.token_urlsafe(32)
    session_id = str(uuid.uuid4())
    now = shown.authenticated
    connection.execute(
        insert(browser_sessions).values(
            id=session_id,
            digest=token_digest(cookie),
            identity_id=primary_of(connection, shown.identity_id),
            created=now,
            last_seen=now,
            expires=now + min(life, idle),
            address=address[:MAX_TEXT],
            user_agent=user_agent[:MAX_TEXT],
        )
    )
    note_authentication(connection, session_id, shown)
    return cookie


def note_authentication(connection: Connection, session_id: str, shown: Authentication) -> None:
    """Remember in a session that an identity has shown who it is."""
    values = {
        "provider_id": shown.provider_id,
        "authenticated": shown.authenticated,
        "methods": " ".join(shown.methods),
    }
    row = upsert(authentications).values(browser_session_id=session_id, identity_id=shown.identity_id, **values)
    connection.execute(row.on_conflict_do_update(index_elements=["browser_session_id", "identity_id"], set_=values))


def renew_cookie(connection: Connection, session_id: str) -> str:
    """A new cookie value for the session; the former one stops working. For after each new authentication."""
    cookie = secrets.token_urlsafe(32)
    connection.execute(
        update(browser_sessions).where(browser_sessions.c.id == session_id).values(digest=token_digest(cookie))
    )
    return cookie


def find_browser_session(connection: Connection, cookie: str, now: float) -> BrowserSession | None:
    """The live session of a cookie; None when it is unknown or over, or its identity was closed."""
    if not 1 <= len(cookie) <= MAX_TOKEN:
        return None
    table = browser_sessions.c
    return _load(connection, (table.digest == token_digest(cookie)) & (table.expires > now))


def _load(connection: Connection, which: ColumnElement[bool]) -> BrowserSession | None:
    row = connection.execute(select(browser_sessions).where(which)).mappings().first()
    if row is None:
        return None
    identity = select_by_ids(connection, [row["identity_id"]])[row["identity_id"]]
    if identity.status == "closed":
        return None
    shown = connection.execute(select(authentications).where(authentications.c.browser_session_id == row["id"]))
    return BrowserSession(
        id=row["id"],
        identity=identity,
        created=row["created"],
        last_seen=row["last_seen"],
        expires=row["expires"],
        address=row["address"],
        user_agent=row["user_agent"],
        authentications={
            item.identity_id: Authentication(
                item.identity_id, item.provider_id, item.authenticated, tuple(item.methods.split())
            )
            for item in shown
        },
    )


def is_stale(session: BrowserSession, now: float, idle: float) -> bool:
    """Whether `touch` is due."""
    return now - session.last_seen > min(_SEEN_EVERY, idle / 4)


def touch(connection: Connection, session: BrowserSession, now: float, *, life: float, idle: float) -> None:
    """Note that the session is in use: it goes on for ``idle`` seconds, within its ``life``."""
    ends = min(session.created + life, now + idle)
    this = browser_sessions.c.id == session.id
    connection.execute(update(browser_sessions).where(this).values(last_seen=now, expires=ends))


def sessions_of(connection: Connection, identity_id: str, now: float) -> list[BrowserSession]:
    """All live sessions of a person, the newest first."""
    table = browser_sessions.c
    query = select(table.id).where(table.identity_id == identity_id, table.expires > now).order_by(table.created.desc())
    found = [_load(connection, table.id == session_id) for session_id in connection.execute(query).scalars().all()]
    return [session for session in found if session is not None]


def end_session(connection: Connection, session_id: str, identity_id: str) -> bool:
    """End one session of a person; returns whether there was one."""
    mine = (browser_sessions.c.id == session_id) & (browser_sessions.c.identity_id == identity_id)
    return connection.execute(delete(browser_sessions).where(mine)).rowcount > 0


def end_all_sessions(connection: Connection, identity_id: str, *, but: str | None = None) -> int:
    """End all sessions of a person but one; returns how many went."""
    others = (browser_sessions.c.identity_id == identity_id) & (browser_sessions.c.id != (but or ""))
    return connection.execute(delete(browser_sessions).where(others)).rowcount


def end_what_was_opened_by(connection: Connection, person_id: str, identity_id: str, *, but: str | None = None) -> None:
    """End all that a person's linked identity alone has signed in, in browsers and with tokens, and take its word for
    the rest back. For when it is not linked any more, or was closed: whoever can still sign in with it, or could, must
    not stay in under the name of the person. The browser session ``but`` goes on."""
    for owners, shown, of_session in (
        (browser_sessions, authentications, authentications.c.browser_session_id),
        (sessions, session_authentications, session_authentications.c.session_id),
    ):
        its_own = select(of_session).where(shown.c.identity_id == identity_id)
        others = select(of_session).where(shown.c.identity_id != identity_id)
        mine = owners.c.identity_id == person_id
        connection.execute(
            delete(owners).where(mine, owners.c.id != (but or ""), owners.c.id.in_(its_own), owners.c.id.not_in(others))
        )
        left = of_session.in_(select(owners.c.id).where(mine))
        connection.execute(delete(shown).where(shown.c.identity_id == identity_id, left))

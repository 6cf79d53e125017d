"""Passwords of local accounts: kept as Argon2id digests (RFC 9106), checked in few threads at a time."""

from __future__ import annotations

import trio
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from protocol.errors import ItemFailed
from relay.store.database import Store
from relay.store.sign_in_tables import passwords

MIN_LENGTH = 10
MAX_LENGTH = 200
# RFC 9106, 4, the second recommended choice: 64 MiB and three passes.
_HASHER = PasswordHasher(time_cost=3, memory_cost=64 * 1024, parallelism=4)
# The digest of a random password that nobody knows, made with the same parameters.
_NOBODY = "$argon2id$v=19$m=65536,t=3,p=4$5kpTcvsbTQSBYovhXx/TRg$kc1/rFyEArqSh/Gsk+UvAIByZ0Go1OG6m/T/Yk8eE/0"


class WeakPassword(ItemFailed):
    """The password is not taken; the sentence says why."""

    default_code = "WEAK_PASSWORD"


def check_strength(password: str, username: str) -> None:
    """Refuse what guessing finds first. Length counts, not kinds of characters (NIST SP 800-63B).

    Raises `WeakPassword`.
    """
    if len(password) < MIN_LENGTH:
        raise WeakPassword(f"A password has at least {MIN_LENGTH} characters. A few words in a row are a good one.")
    if len(password) > MAX_LENGTH:
        raise WeakPassword(f"A password has at most {MAX_LENGTH} characters.")
    plain = password.casefold()
    name = username.partition("@")[0].casefold()
    if len(set(plain)) < 4 or (len(name) >= 4 and plain.startswith(name) and len(plain) < len(name) + 6):
        raise WeakPassword("This password is too easy to guess; take another.")
    if plain in _FIRST_GUESSES:
        raise WeakPassword("This password is among those that are tried first; take another.")


def digest_of(password: str) -> str:
    """The digest to store. Takes some tens of milliseconds and 64 MiB: not for the event loop."""
    return _HASHER.hash(password)


def store_digest(connection: Connection, identity_id: str, digest: str, now: float) -> None:
    """Make this the identity's password."""
    values = {"digest": digest, "changed": now}
    row = insert(passwords).values(identity_id=identity_id, **values)
    connection.execute(row.on_conflict_do_update(index_elements=["identity_id"], set_=values))


def remove(connection: Connection, identity_id: str) -> bool:
    """Take the password away; returns whether there was one."""
    return connection.execute(delete(passwords).where(passwords.c.identity_id == identity_id)).rowcount > 0


def has_password(connection: Connection, identity_id: str) -> bool:
    """Whether the identity can sign in with a password."""
    found = connection.execute(select(passwords.c.changed).where(passwords.c.identity_id == identity_id)).first()
    return found is not None


class PasswordChecker:
    """Checks passwords against the store, a few at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # 64 MiB and a processor core for each check under way.
        self._limit = trio.CapacityLimiter(2)

    async def check(self, identity_id: str | None, password: str) -> bool:
        """Whether this is the identity's password; for None it is not, which takes as long to find out.

        Raises the store's errors.
        """
        if not 1 <= len(password) <= MAX_LENGTH:
            return False
        query = select(passwords.c.digest).where(passwords.c.identity_id == (identity_id or ""))
        digest = await self._store.read(lambda connection: connection.execute(query).scalar_one_or_none())
        right = await trio.to_thread.run_sync(_matches, digest or _NOBODY, password, limiter=self._limit)
        return right and digest is not None

    async def digest(self, password: str) -> str:
        """The digest of a new password."""
        return await trio.to_thread.run_sync(digest_of, password, limiter=self._limit)


def _matches(digest: str, password: str) -> bool:
    try:
        # Compares in constant time.
        return _HASHER.verify(digest, password)
    except (VerificationError, InvalidHashError, UnicodeEncodeError):
        return False


_FIRST_GUESSES = frozenset(
    {
        *("1234567890", "0123456789", "12345678910", "123123123123", "1q2w3e4r5t", "qwertyuiop", "qwerty12345"),
        *("password12", "password123", "password1234", "passw0rd123", "iloveyou12", "letmein123", "welcome123"),
        *("administrator", "adminadmin", "changeme123", "correcthorse", "correct horse battery staple"),
    }
)

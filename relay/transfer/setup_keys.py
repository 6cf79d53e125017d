"""Setup keys: one-time secrets with which an agent enrols, in a form that also says where and whom to trust.

``twp-`` and base64url of the JSON list ``[relay URL, SHA-256 of the relay's CA certificate or null, secret]``. The
relay keeps only the SHA-256 of the whole text: the secret has 256 random bits, so nothing slower is needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets

from sqlalchemy import Connection, insert

from relay.store import transfer_tables as tables

PREFIX = "twp-"
MAX_KEY = 2048


def make(relay_url: str, ca_fingerprint: str | None) -> str:
    """A new setup key."""
    text = json.dumps([relay_url, ca_fingerprint, secrets.token_urlsafe(32)], separators=(",", ":"))
    return PREFIX + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def digest(setup_key: str) -> str:
    """What is stored of a key and what an agent's proof names: lower-case hex SHA-256 of its text."""
    return hashlib.sha256(setup_key.encode("utf-8", "replace")).hexdigest()


def add(connection: Connection, setup_key: str, collection_id: str, *, now: float, life: float) -> None:
    """Let a key enrol the agent of a collection for ``life`` seconds from ``now`` (Unix seconds) on."""
    connection.execute(
        insert(tables.setup_keys).values(
            digest=digest(setup_key), collection_id=collection_id, created=now, expires=now + life
        )
    )

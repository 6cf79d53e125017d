"""The table of the audit log. Triggers of the database itself refuse to change or delete its rows."""

from __future__ import annotations

from sqlalchemy import Column, Float, Integer, String, Table, Text

from relay.store.metadata import metadata

audit_log = Table(
    "audit_log",
    metadata,
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("time", Float, nullable=False, index=True),
    # JSON of everything else, in the canonical form whose digest `hash` is.
    Column("entry", Text, nullable=False),
    Column("hash", String(64), nullable=False),
)

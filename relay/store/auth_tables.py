"""Tables of identities, clients and tokens. Times are Unix seconds; secrets and tokens appear only as digests."""

from __future__ import annotations

from sqlalchemy import Boolean, CheckConstraint, Column, Float, ForeignKey, Index, String, Table, Text

from relay.store.metadata import metadata

identities = Table(
    "identities",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("username", String(320), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("name", Text),
    Column("email", Text),
    Column("organization", Text),
    Column("provider_id", String(36), nullable=False),
    Column("created", Float, nullable=False),
    CheckConstraint("kind IN ('login', 'client_identity')", name="kind"),
    CheckConstraint("status IN ('used', 'unused', 'private', 'closed')", name="status"),
)

clients = Table(
    "clients",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", Text, nullable=False),
    Column("public", Boolean(name="public"), nullable=False, default=False),
    Column("owner_id", String(36), ForeignKey("identities.id")),
    Column("created", Float, nullable=False),
)

# A client may hold several secrets, so that one can be replaced without a moment in which none is valid.
client_secrets = Table(
    "client_secrets",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("client_id", String(36), ForeignKey("clients.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("digest", Text, nullable=False),
    Column("created", Float, nullable=False),
)

# A session is one act of signing in; all tokens that came of it name it.
sessions = Table(
    "sessions",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("client_id", String(36), ForeignKey("clients.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("authenticated", Float, nullable=False),
    Column("created", Float, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    # SHA-256 of the token in hex. The token has 256 random bits, so a slow digest would add nothing.
    Column("digest", String(64), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("session_id", String(36), ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=False),
    Column("client_id", String(36), ForeignKey("clients.id", ondelete="CASCADE"), nullable=False),
    Column("resource_server", String(320), nullable=False),
    Column("scope", Text, nullable=False),
    Column("issued", Float, nullable=False),
    Column("expires", Float, nullable=False),
    CheckConstraint("kind IN ('access', 'refresh')", name="kind"),
    Index(None, "client_id", "identity_id"),
    Index(None, "expires"),
)

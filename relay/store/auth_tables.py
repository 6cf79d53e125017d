"""Tables of identities, clients and tokens. Times are Unix seconds; secrets and tokens appear only as digests."""

from __future__ import annotations

from sqlalchemy import Boolean, CheckConstraint, Column, Float, ForeignKey, Index, String, Table, Text, false

from relay.store.metadata import metadata

identities = Table(
    "identities",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("username", String(320), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("status", String(16), nullable=False, index=True),
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
    # The application of which this client is one installation's own copy.
    Column("parent_id", String(36), ForeignKey("clients.id")),
    # A JSON list. For public clients and copies, loopback addresses and the relay's page count besides.
    Column("redirect_uris", Text, nullable=False, server_default="[]"),
    # Whether each use of a refresh token replaces it (RFC 9700, 4.14).
    Column("rotates", Boolean(name="rotates"), nullable=False, server_default=false()),
    Column("last_used", Float),
)

# A client may hold several secrets, so that one can be replaced without a moment in which none is valid.
client_secrets = Table(
    "client_secrets",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("client_id", String(36), ForeignKey("clients.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("digest", Text, nullable=False),
    Column("created", Float, nullable=False),
    # What the developer calls it.
    Column("name", Text, nullable=False, server_default=""),
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
    # What its owner calls a token of long life.
    Column("name", Text),
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
    # When a refresh token was replaced by its successor.
    Column("replaced", Float),
    CheckConstraint("kind IN ('access', 'refresh')", name="kind"),
    Index(None, "client_id", "identity_id"),
    Index(None, "expires"),
)

"""Tables of people signing in: passwords, passkeys, browser sessions, linked identities, codes and consents.

Times are Unix seconds. Whatever would let somebody in appears only as a digest.
"""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from relay.store.metadata import metadata


def _identity(name: str = "identity_id", *, nullable: bool = False) -> Column[str]:
    return Column(name, String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=nullable)


def _client() -> Column[str]:
    return Column("client_id", String(36), ForeignKey("clients.id", ondelete="CASCADE"), nullable=False)


passwords = Table(
    "passwords",
    metadata,
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True),
    # Argon2id in its usual text form, which names its own parameters.
    Column("digest", Text, nullable=False),
    Column("changed", Float, nullable=False),
)

passkeys = Table(
    "passkeys",
    metadata,
    # The credential's id in base64url, as browsers know it.
    Column("id", String(1400), primary_key=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("public_key", LargeBinary, nullable=False),
    Column("sign_count", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("last_used", Float),
)

# Links that work once: to become the relay's first administrator, or to set a password.
one_time_links = Table(
    "one_time_links",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("purpose", String(16), nullable=False),
    _identity(nullable=True),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    CheckConstraint("purpose IN ('administrator', 'password')", name="purpose"),
)

administrators = Table(
    "administrators",
    metadata,
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True),
    Column("created", Float, nullable=False),
)

# Who an identity belongs to. An identity that is not here is alone and its own primary.
linked_identities = Table(
    "linked_identities",
    metadata,
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True),
    Column("primary_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created", Float, nullable=False),
)

# Which account at an upstream provider an identity is.
upstream_accounts = Table(
    "upstream_accounts",
    metadata,
    Column("issuer", String(255), primary_key=True),
    Column("subject", String(255), primary_key=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created", Float, nullable=False),
)

# A visit to an upstream provider that is under way.
upstream_visits = Table(
    "upstream_visits",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("provider", String(64), nullable=False),
    # SHA-256 of the cookie of the browser that began it.
    Column("browser", String(64), nullable=False),
    Column("nonce", String(64), nullable=False),
    # Of the PKCE verifier: it is worth something only together with the code, the state and the client's secret.
    Column("verifier", String(128), nullable=False),
    Column("destination", Text, nullable=False),
    # Set when the visit is for linking a further identity to this one.
    _identity(nullable=True),
    Column("expires", Float, nullable=False, index=True),
)

# Wrong guesses of the last minutes, so that a restart of the relay forgives none.
guess_failures = Table(
    "guess_failures",
    metadata,
    Column("counter", String(16), primary_key=True),
    # A digest of who guessed at what.
    Column("subject", String(64), primary_key=True),
    # A JSON list.
    Column("times", Text, nullable=False),
    Column("last", Float, nullable=False, index=True),
)

browser_sessions = Table(
    "browser_sessions",
    metadata,
    Column("id", String(36), primary_key=True),
    # SHA-256 of the cookie.
    Column("digest", String(64), nullable=False, unique=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created", Float, nullable=False),
    Column("last_seen", Float, nullable=False),
    Column("expires", Float, nullable=False, index=True),
    Column("address", Text, nullable=False),
    Column("user_agent", Text, nullable=False),
)

# Which identities have shown who they are in a browser session, when and how.
authentications = Table(
    "authentications",
    metadata,
    Column("browser_session_id", String(36), ForeignKey("browser_sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True),
    Column("provider_id", String(36), nullable=False),
    Column("authenticated", Float, nullable=False),
    # Words of RFC 8176 with spaces between.
    Column("methods", Text, nullable=False),
)

# The same, as it was when the tokens of a session were given.
session_authentications = Table(
    "session_authentications",
    metadata,
    Column("session_id", String(36), ForeignKey("sessions.id", ondelete="CASCADE"), primary_key=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True),
    Column("provider_id", String(36), nullable=False),
    Column("authenticated", Float, nullable=False),
    Column("methods", Text, nullable=False),
)

authorization_codes = Table(
    "authorization_codes",
    metadata,
    Column("digest", String(64), primary_key=True),
    _client(),
    _identity(),
    # The session to which its tokens belong, made together with the code.
    Column("session_id", String(36), ForeignKey("sessions.id", ondelete="CASCADE"), nullable=False),
    Column("redirect_uri", Text, nullable=False),
    Column("challenge", String(128)),
    Column("scope", Text, nullable=False),
    Column("offline", Boolean(name="offline"), nullable=False),
    Column("nonce", Text),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False, index=True),
    # A code stays here after its use, so that a second use is noticed.
    Column("used", Float),
)

device_codes = Table(
    "device_codes",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("user_code", String(64), nullable=False, unique=True),
    _client(),
    Column("scope", Text, nullable=False),
    Column("offline", Boolean(name="offline"), nullable=False),
    Column("address", Text, nullable=False),
    Column("user_agent", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False, index=True),
    Column("last_polled", Float),
    Column("interval", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    _identity(nullable=True),
    Column("session_id", String(36), ForeignKey("sessions.id", ondelete="CASCADE")),
    CheckConstraint("state IN ('waiting', 'allowed', 'refused')", name="state"),
)

# A tree for each identity and client: what was allowed, and under it what that in turn may use.
consents = Table(
    "consents",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    _identity(),
    _client(),
    Column("parent_id", Integer, ForeignKey("consents.id", ondelete="CASCADE"), index=True),
    Column("scope", Text, nullable=False),
    Column("optional", Boolean(name="optional"), nullable=False),
    Column("allows_refresh", Boolean(name="allows_refresh"), nullable=False),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Column("last_used", Float, nullable=False),
    Index(None, "identity_id", "client_id"),
    UniqueConstraint("identity_id", "client_id", "parent_id", "scope"),
)

# Scopes that clients of this relay offer, beside those that every relay knows.
scopes = Table(
    "scopes",
    metadata,
    Column("id", String(36), primary_key=True),
    _client(),
    Column("suffix", String(255), nullable=False),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("advertised", Boolean(name="advertised"), nullable=False),
    Column("allows_refresh", Boolean(name="allows_refresh"), nullable=False),
    # A JSON list.
    Column("required_domains", Text, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("client_id", "suffix"),
)

scope_dependencies = Table(
    "scope_dependencies",
    metadata,
    Column("scope_id", String(36), ForeignKey("scopes.id", ondelete="CASCADE"), primary_key=True),
    # The whole scope string that the scope needs.
    Column("needs", String(500), primary_key=True),
    Column("optional", Boolean(name="optional"), nullable=False),
    Column("requires_refresh_token", Boolean(name="requires_refresh_token"), nullable=False),
)

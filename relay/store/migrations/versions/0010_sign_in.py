"""Signing in with a browser: passwords, passkeys, sessions, linked identities, codes, consents and custom scopes."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0002"
branch_labels = None
depends_on = None


def _fk(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{other}.id"], ondelete="CASCADE", name=f"fk_{table}_{column}_{other}")


def upgrade() -> None:
    # Written out: Alembic would rebuild the table for the foreign key, and dropping the old one would take along
    # everything that refers to it.
    op.execute(
        "ALTER TABLE clients ADD COLUMN parent_id VARCHAR(36) "
        "CONSTRAINT fk_clients_parent_id_clients REFERENCES clients (id)"
    )
    op.add_column("clients", sa.Column("redirect_uris", sa.Text(), nullable=False, server_default="[]"))
    op.add_column("clients", sa.Column("rotates", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("clients", sa.Column("last_used", sa.Float()))
    op.add_column("sessions", sa.Column("name", sa.Text()))
    op.add_column("tokens", sa.Column("replaced", sa.Float()))
    _people()
    _sessions()
    _grants()


def _people() -> None:
    op.create_table(
        "passwords",
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("changed", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("identity_id", name="pk_passwords"),
        _fk("passwords", "identity_id", "identities"),
    )
    op.create_table(
        "passkeys",
        sa.Column("id", sa.String(1400), nullable=False),
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("sign_count", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("last_used", sa.Float()),
        sa.PrimaryKeyConstraint("id", name="pk_passkeys"),
        _fk("passkeys", "identity_id", "identities"),
    )
    op.create_index("ix_passkeys_identity_id", "passkeys", ["identity_id"])
    op.create_table(
        "one_time_links",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("identity_id", sa.String(36)),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_one_time_links"),
        _fk("one_time_links", "identity_id", "identities"),
        sa.CheckConstraint("purpose IN ('administrator', 'password')", name="ck_one_time_links_purpose"),
    )
    op.create_table(
        "administrators",
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("identity_id", name="pk_administrators"),
        _fk("administrators", "identity_id", "identities"),
    )
    op.create_table(
        "linked_identities",
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("primary_id", sa.String(36), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("identity_id", name="pk_linked_identities"),
        _fk("linked_identities", "identity_id", "identities"),
        _fk("linked_identities", "primary_id", "identities"),
    )
    op.create_index("ix_linked_identities_primary_id", "linked_identities", ["primary_id"])
    op.create_table(
        "upstream_accounts",
        sa.Column("issuer", sa.String(255), nullable=False),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("issuer", "subject", name="pk_upstream_accounts"),
        _fk("upstream_accounts", "identity_id", "identities"),
    )
    op.create_index("ix_upstream_accounts_identity_id", "upstream_accounts", ["identity_id"])
    op.create_table(
        "upstream_visits",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("browser", sa.String(64), nullable=False),
        sa.Column("nonce", sa.String(64), nullable=False),
        sa.Column("verifier", sa.String(128), nullable=False),
        sa.Column("destination", sa.Text(), nullable=False),
        sa.Column("identity_id", sa.String(36)),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_upstream_visits"),
        _fk("upstream_visits", "identity_id", "identities"),
    )
    op.create_index("ix_upstream_visits_expires", "upstream_visits", ["expires"])


def _sessions() -> None:
    op.create_table(
        "browser_sessions",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("last_seen", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("user_agent", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_browser_sessions"),
        sa.UniqueConstraint("digest", name="uq_browser_sessions_digest"),
        _fk("browser_sessions", "identity_id", "identities"),
    )
    op.create_index("ix_browser_sessions_identity_id", "browser_sessions", ["identity_id"])
    op.create_index("ix_browser_sessions_expires", "browser_sessions", ["expires"])
    for table, owner, others in (
        ("authentications", "browser_session_id", "browser_sessions"),
        ("session_authentications", "session_id", "sessions"),
    ):
        op.create_table(
            table,
            sa.Column(owner, sa.String(36), nullable=False),
            sa.Column("identity_id", sa.String(36), nullable=False),
            sa.Column("provider_id", sa.String(36), nullable=False),
            sa.Column("authenticated", sa.Float(), nullable=False),
            sa.Column("methods", sa.Text(), nullable=False),
            sa.PrimaryKeyConstraint(owner, "identity_id", name=f"pk_{table}"),
            _fk(table, owner, others),
            _fk(table, "identity_id", "identities"),
        )


def _grants() -> None:
    op.create_table(
        "authorization_codes",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("client_id", sa.String(36), nullable=False),
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("session_id", sa.String(36), nullable=False),
        sa.Column("redirect_uri", sa.Text(), nullable=False),
        sa.Column("challenge", sa.String(128)),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("offline", sa.Boolean(), nullable=False),
        sa.Column("nonce", sa.Text()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("used", sa.Float()),
        sa.PrimaryKeyConstraint("digest", name="pk_authorization_codes"),
        _fk("authorization_codes", "client_id", "clients"),
        _fk("authorization_codes", "identity_id", "identities"),
        _fk("authorization_codes", "session_id", "sessions"),
    )
    op.create_index("ix_authorization_codes_expires", "authorization_codes", ["expires"])
    op.create_table(
        "device_codes",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("user_code", sa.String(64), nullable=False),
        sa.Column("client_id", sa.String(36), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("offline", sa.Boolean(), nullable=False),
        sa.Column("address", sa.Text(), nullable=False),
        sa.Column("user_agent", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("last_polled", sa.Float()),
        sa.Column("interval", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("identity_id", sa.String(36)),
        sa.Column("session_id", sa.String(36)),
        sa.PrimaryKeyConstraint("digest", name="pk_device_codes"),
        sa.UniqueConstraint("user_code", name="uq_device_codes_user_code"),
        _fk("device_codes", "client_id", "clients"),
        _fk("device_codes", "identity_id", "identities"),
        _fk("device_codes", "session_id", "sessions"),
        sa.CheckConstraint("state IN ('waiting', 'allowed', 'refused')", name="ck_device_codes_state"),
    )
    op.create_index("ix_device_codes_expires", "device_codes", ["expires"])
    op.create_table(
        "consents",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.Column("client_id", sa.String(36), nullable=False),
        sa.Column("parent_id", sa.Integer()),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("optional", sa.Boolean(), nullable=False),
        sa.Column("allows_refresh", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("updated", sa.Float(), nullable=False),
        sa.Column("last_used", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_consents"),
        _fk("consents", "identity_id", "identities"),
        _fk("consents", "client_id", "clients"),
        _fk("consents", "parent_id", "consents"),
        sa.UniqueConstraint(
            "identity_id", "client_id", "parent_id", "scope", name="uq_consents_identity_id_client_id_parent_id_scope"
        ),
    )
    op.create_index("ix_consents_parent_id", "consents", ["parent_id"])
    op.create_index("ix_consents_identity_id_client_id", "consents", ["identity_id", "client_id"])
    op.create_table(
        "scopes",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("client_id", sa.String(36), nullable=False),
        sa.Column("suffix", sa.String(255), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("advertised", sa.Boolean(), nullable=False),
        sa.Column("allows_refresh", sa.Boolean(), nullable=False),
        sa.Column("required_domains", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_scopes"),
        sa.UniqueConstraint("client_id", "suffix", name="uq_scopes_client_id_suffix"),
        _fk("scopes", "client_id", "clients"),
    )
    op.create_table(
        "scope_dependencies",
        sa.Column("scope_id", sa.String(36), nullable=False),
        sa.Column("needs", sa.String(500), nullable=False),
        sa.Column("optional", sa.Boolean(), nullable=False),
        sa.Column("requires_refresh_token", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("scope_id", "needs", name="pk_scope_dependencies"),
        _fk("scope_dependencies", "scope_id", "scopes"),
    )

"""Tables of the applications that developers register: projects, what a client is registered as, policies."""

from __future__ import annotations

from sqlalchemy import Boolean, CheckConstraint, Column, Float, ForeignKey, String, Table, Text

from relay.store.metadata import metadata

projects = Table(
    "projects",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("contact_email", Text, nullable=False),
    Column("created", Float, nullable=False),
    # The identity for which it counts, also when that is no more; null where it was made before this was noted.
    Column("created_by", String(36), index=True),
)

project_admins = Table(
    "project_admins",
    metadata,
    Column("project_id", String(36), ForeignKey("projects.id", ondelete="CASCADE"), primary_key=True),
    Column("identity_id", String(36), ForeignKey("identities.id", ondelete="CASCADE"), primary_key=True, index=True),
)

# What is known of a client beside its row in `clients`, when a developer registered it.
registrations = Table(
    "registrations",
    metadata,
    Column("client_id", String(36), ForeignKey("clients.id", ondelete="CASCADE"), primary_key=True),
    Column("project_id", String(36), ForeignKey("projects.id"), nullable=False, index=True),
    Column("client_type", String(48), nullable=False),
    Column("visibility", String(8), nullable=False),
    Column("terms_and_conditions", Text),
    Column("privacy_policy", Text),
    Column("preselect_idp", String(36)),
    # The provider from which a person must have an identity.
    Column("required_idp", String(36)),
    # The client that registered this one, if it was no person.
    Column("registered_by", String(36), ForeignKey("clients.id"), index=True),
    CheckConstraint("visibility IN ('private', 'public')", name="visibility"),
)

policies = Table(
    "policies",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("project_id", String(36), ForeignKey("projects.id"), nullable=False, index=True),
    Column("display_name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("high_assurance", Boolean(name="high_assurance"), nullable=False),
    # Seconds since somebody last showed who they are.
    Column("assurance_timeout", Float),
    Column("required_mfa", Boolean(name="required_mfa"), nullable=False),
    # JSON lists of domains, or null for no constraint.
    Column("domains_include", Text),
    Column("domains_exclude", Text),
    Column("created", Float, nullable=False),
)

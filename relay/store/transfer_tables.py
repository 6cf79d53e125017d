"""Tables of endpoints, nodes, collections, roles, bookmarks and tasks. Times are Unix seconds; setup keys are digests.

Rows of collections and tasks are never deleted: a deleted collection keeps its row with ``deleted`` set, so that old
tasks and bookmarks can still say what they were about.
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

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner_id", String(36), nullable=False, index=True),
    Column("created", Float, nullable=False),
)

nodes = Table(
    "nodes",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("endpoint_id", String(36), ForeignKey("endpoints.id"), nullable=False, index=True),
    Column("certificate", Text, nullable=False),
    Column("fingerprint", String(64), nullable=False, unique=True),
    Column("hostname", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("last_seen", Float),
    # Which numbering of events `last_event` belongs to, and the last one that is stored here.
    Column("journal", Text, nullable=False),
    Column("last_event", Integer, nullable=False),
    Column("paused", Boolean(name="paused"), nullable=False),
    # Since when the operator wants nothing to do with the agent any more.
    Column("revoked", Float),
)

collections = Table(
    "collections",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner_id", String(36), nullable=False, index=True),
    # Both null until the setup key of the collection has been redeemed.
    Column("endpoint_id", String(36), ForeignKey("endpoints.id")),
    Column("node_id", String(36), ForeignKey("nodes.id"), index=True),
    Column("display_name", Text, nullable=False),
    Column("public", Boolean(name="public"), nullable=False),
    Column("description", Text),
    Column("organization", Text),
    Column("department", Text),
    Column("keywords", Text),
    Column("contact_email", Text),
    Column("contact_info", Text),
    Column("info_link", Text),
    Column("user_message", Text),
    Column("user_message_link", Text),
    Column("location", Text),
    Column("default_directory", Text),
    Column("network_use", String(16)),
    Column("force_encryption", Boolean(name="force_encryption"), nullable=False),
    Column("disable_verify", Boolean(name="disable_verify"), nullable=False),
    Column("force_verify", Boolean(name="force_verify"), nullable=False),
    Column("disable_anonymous_writes", Boolean(name="disable_anonymous_writes"), nullable=False),
    Column("subscription_id", String(36)),
    Column("subscription_admin_verified", Boolean(name="subscription_admin_verified"), nullable=False),
    # JSON, as it was given.
    Column("notification_policy", Text),
    # What the owner's configuration says; the agent reports it and the relay never widens it.
    Column("read_only", Boolean(name="read_only"), nullable=False),
    Column("shareable", Boolean(name="shareable"), nullable=False),
    Column("available", Boolean(name="available"), nullable=False),
    Column("reported_directory", Text),
    # Null until an agent serves the collection.
    Column("home", Text),
    Column("created", Float, nullable=False),
    Column("last_accessed", Float),
    Column("deleted", Float),
)

# A setup key has 256 random bits, so a plain digest is as good as a slow one.
setup_keys = Table(
    "setup_keys",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("collection_id", String(36), ForeignKey("collections.id"), nullable=False, index=True),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("redeemed", Float),
    Column("node_id", String(36), ForeignKey("nodes.id")),
)

roles = Table(
    "roles",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("collection_id", String(36), ForeignKey("collections.id"), nullable=False),
    Column("principal_type", String(16), nullable=False),
    Column("principal", String(36), nullable=False, index=True),
    Column("role", String(32), nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("collection_id", "principal_type", "principal", "role"),
    CheckConstraint("principal_type IN ('identity', 'group')", name="principal_type"),
    CheckConstraint("role IN ('administrator', 'access_manager', 'activity_manager', 'activity_monitor')", name="role"),
)

# ``path`` is a folder in its canonical text from the root, with a slash at its end.
access_rules = Table(
    "access_rules",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("collection_id", String(36), ForeignKey("collections.id"), nullable=False),
    Column("principal_type", String(32), nullable=False),
    # Empty for all_authenticated_users and anonymous.
    Column("principal", String(36), nullable=False, index=True),
    Column("path", Text, nullable=False),
    Column("permissions", String(2), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, index=True),
    UniqueConstraint("collection_id", "principal_type", "principal", "path"),
    CheckConstraint(
        "principal_type IN ('identity', 'group', 'all_authenticated_users', 'anonymous')", name="principal_type"
    ),
    CheckConstraint("permissions IN ('r', 'rw')", name="permissions"),
)

bookmarks = Table(
    "bookmarks",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner_id", String(36), nullable=False),
    Column("name", Text, nullable=False),
    Column("endpoint_id", String(36), nullable=False),
    Column("path", Text, nullable=False),
    Column("pinned", Boolean(name="pinned"), nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("owner_id", "name"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner_id", String(36), nullable=False),
    Column("owner", Text, nullable=False),
    Column("submission_id", String(36), nullable=False),
    Column("type", String(8), nullable=False),
    Column("label", Text),
    Column("requested", Float, nullable=False),
    Column("deadline", Float),
    Column("completed", Float),
    # For deletes the one collection is the source, as in the Globus documents.
    Column("source_id", String(36), ForeignKey("collections.id"), nullable=False, index=True),
    Column("destination_id", String(36), ForeignKey("collections.id"), index=True),
    # Globus's word (ACTIVE, SUCCEEDED, FAILED) and the agent's own.
    Column("status", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    # JSON of TaskOptions, the last TaskObserved and, for failed tasks, {"code", "description"}.
    Column("options", Text, nullable=False),
    Column("observed", Text),
    Column("fatal_error", Text),
    Column("submitted", Text, nullable=False),
    Column("item_count", Integer, nullable=False),
    Column("hidden", Boolean(name="hidden"), nullable=False),
    # Desired state. `attempted` is set before the first order leaves: from then on the agent may be running the task.
    Column("desired", String(8), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("delivered", Integer, nullable=False),
    Column("attempted", Boolean(name="attempted"), nullable=False),
    Column("cancel_time", Float),
    Column("held_by", String(16)),
    Column("last_seq", Integer, nullable=False),
    Column("session_id", String(36), nullable=False),
    Column("session_open", Boolean(name="session_open"), nullable=False),
    Column("ticket_issued", Float),
    # What the agents still have to be told once the task is over.
    Column("closed", Boolean(name="closed"), nullable=False),
    UniqueConstraint("owner_id", "submission_id"),
    Index(None, "owner_id", "requested"),
    Index(None, "owner_id", "status", "requested"),
    Index(None, "status", "deadline"),
    Index(None, "status", "desired", "ticket_issued"),
    Index(None, "closed"),
    CheckConstraint("type IN ('TRANSFER', 'DELETE')", name="type"),
    CheckConstraint("status IN ('ACTIVE', 'INACTIVE', 'SUCCEEDED', 'FAILED')", name="status"),
    CheckConstraint("desired IN ('run', 'pause', 'cancel')", name="desired"),
)

# One compressed blob a task: a submission of 100,000 items is one row, and only the steward reads it.
task_items = Table(
    "task_items",
    metadata,
    Column("task_id", String(36), ForeignKey("tasks.id"), primary_key=True),
    Column("items", LargeBinary, nullable=False),
    # JSON: the path prefixes that tickets of this task name, for each side.
    Column("scope", Text, nullable=False),
)

task_events = Table(
    "task_events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("task_id", String(36), ForeignKey("tasks.id"), nullable=False),
    # Number given by the agent; null for events of the relay's own.
    Column("seq", Integer),
    Column("time", Float, nullable=False),
    Column("code", String(64), nullable=False),
    Column("description", Text, nullable=False),
    Column("details", Text, nullable=False),
    Column("is_error", Boolean(name="is_error"), nullable=False),
    UniqueConstraint("task_id", "seq"),
    Index(None, "task_id", "time"),
)

"""Endpoints, nodes, collections, roles, bookmarks and tasks."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _places()
    _people()
    _tasks()
    _task_parts()


def _places() -> None:
    op.create_table(
        "endpoints",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("owner_id", sa.String(36), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_endpoints"),
    )
    op.create_index("ix_endpoints_owner_id", "endpoints", ["owner_id"])
    op.create_table(
        "nodes",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("endpoint_id", sa.String(36), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("last_seen", sa.Float()),
        sa.Column("journal", sa.Text(), nullable=False),
        sa.Column("last_event", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["endpoint_id"], ["endpoints.id"], name="fk_nodes_endpoint_id_endpoints"),
        sa.PrimaryKeyConstraint("id", name="pk_nodes"),
        sa.UniqueConstraint("fingerprint", name="uq_nodes_fingerprint"),
    )
    op.create_index("ix_nodes_endpoint_id", "nodes", ["endpoint_id"])
    op.create_table(
        "collections",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("owner_id", sa.String(36), nullable=False),
        sa.Column("endpoint_id", sa.String(36)),
        sa.Column("node_id", sa.String(36)),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("description", sa.Text()),
        sa.Column("organization", sa.Text()),
        sa.Column("department", sa.Text()),
        sa.Column("keywords", sa.Text()),
        sa.Column("contact_email", sa.Text()),
        sa.Column("contact_info", sa.Text()),
        sa.Column("info_link", sa.Text()),
        sa.Column("user_message", sa.Text()),
        sa.Column("user_message_link", sa.Text()),
        sa.Column("location", sa.Text()),
        sa.Column("default_directory", sa.Text()),
        sa.Column("network_use", sa.String(16)),
        sa.Column("force_encryption", sa.Boolean(), nullable=False),
        sa.Column("disable_verify", sa.Boolean(), nullable=False),
        sa.Column("force_verify", sa.Boolean(), nullable=False),
        sa.Column("disable_anonymous_writes", sa.Boolean(), nullable=False),
        sa.Column("subscription_id", sa.String(36)),
        sa.Column("subscription_admin_verified", sa.Boolean(), nullable=False),
        sa.Column("notification_policy", sa.Text()),
        sa.Column("read_only", sa.Boolean(), nullable=False),
        sa.Column("shareable", sa.Boolean(), nullable=False),
        sa.Column("available", sa.Boolean(), nullable=False),
        sa.Column("reported_directory", sa.Text()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("last_accessed", sa.Float()),
        sa.Column("deleted", sa.Float()),
        sa.ForeignKeyConstraint(["endpoint_id"], ["endpoints.id"], name="fk_collections_endpoint_id_endpoints"),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name="fk_collections_node_id_nodes"),
        sa.PrimaryKeyConstraint("id", name="pk_collections"),
    )
    op.create_index("ix_collections_node_id", "collections", ["node_id"])
    op.create_index("ix_collections_owner_id", "collections", ["owner_id"])
    op.create_table(
        "setup_keys",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("collection_id", sa.String(36), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.Column("redeemed", sa.Float()),
        sa.Column("node_id", sa.String(36)),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name="fk_setup_keys_collection_id_collections"),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name="fk_setup_keys_node_id_nodes"),
        sa.PrimaryKeyConstraint("digest", name="pk_setup_keys"),
    )
    op.create_index("ix_setup_keys_collection_id", "setup_keys", ["collection_id"])


def _people() -> None:
    op.create_table(
        "roles",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("collection_id", sa.String(36), nullable=False),
        sa.Column("principal_type", sa.String(16), nullable=False),
        sa.Column("principal", sa.String(36), nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.CheckConstraint("principal_type IN ('identity', 'group')", name="ck_roles_ck_roles_principal_type"),
        sa.CheckConstraint(
            "role IN ('administrator', 'access_manager', 'activity_manager', 'activity_monitor')",
            name="ck_roles_ck_roles_role",
        ),
        sa.ForeignKeyConstraint(["collection_id"], ["collections.id"], name="fk_roles_collection_id_collections"),
        sa.PrimaryKeyConstraint("id", name="pk_roles"),
        sa.UniqueConstraint(
            "collection_id",
            "principal_type",
            "principal",
            "role",
            name="uq_roles_collection_id_principal_type_principal_role",
        ),
    )
    op.create_index("ix_roles_principal", "roles", ["principal"])
    op.create_table(
        "bookmarks",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("owner_id", sa.String(36), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("endpoint_id", sa.String(36), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bookmarks"),
        sa.UniqueConstraint("owner_id", "name", name="uq_bookmarks_owner_id_name"),
    )


def _tasks() -> None:
    op.create_table(
        "tasks",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("owner_id", sa.String(36), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("submission_id", sa.String(36), nullable=False),
        sa.Column("type", sa.String(8), nullable=False),
        sa.Column("label", sa.Text()),
        sa.Column("requested", sa.Float(), nullable=False),
        sa.Column("deadline", sa.Float()),
        sa.Column("completed", sa.Float()),
        sa.Column("source_id", sa.String(36), nullable=False),
        sa.Column("destination_id", sa.String(36)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("options", sa.Text(), nullable=False),
        sa.Column("observed", sa.Text()),
        sa.Column("fatal_error", sa.Text()),
        sa.Column("submitted", sa.Text(), nullable=False),
        sa.Column("item_count", sa.Integer(), nullable=False),
        sa.Column("hidden", sa.Boolean(), nullable=False),
        sa.Column("desired", sa.String(8), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("delivered", sa.Integer(), nullable=False),
        sa.Column("attempted", sa.Boolean(), nullable=False),
        sa.Column("cancel_time", sa.Float()),
        sa.Column("held_by", sa.String(16)),
        sa.Column("last_seq", sa.Integer(), nullable=False),
        sa.Column("session_id", sa.String(36), nullable=False),
        sa.Column("session_open", sa.Boolean(), nullable=False),
        sa.Column("ticket_issued", sa.Float()),
        sa.Column("closed", sa.Boolean(), nullable=False),
        sa.CheckConstraint("desired IN ('run', 'pause', 'cancel')", name="ck_tasks_ck_tasks_desired"),
        sa.CheckConstraint("status IN ('ACTIVE', 'INACTIVE', 'SUCCEEDED', 'FAILED')", name="ck_tasks_ck_tasks_status"),
        sa.CheckConstraint("type IN ('TRANSFER', 'DELETE')", name="ck_tasks_ck_tasks_type"),
        sa.ForeignKeyConstraint(["destination_id"], ["collections.id"], name="fk_tasks_destination_id_collections"),
        sa.ForeignKeyConstraint(["source_id"], ["collections.id"], name="fk_tasks_source_id_collections"),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.UniqueConstraint("owner_id", "submission_id", name="uq_tasks_owner_id_submission_id"),
    )
    op.create_index("ix_tasks_closed", "tasks", ["closed"])
    op.create_index("ix_tasks_destination_id", "tasks", ["destination_id"])
    op.create_index("ix_tasks_owner_id_requested", "tasks", ["owner_id", "requested"])
    op.create_index("ix_tasks_source_id", "tasks", ["source_id"])
    op.create_index("ix_tasks_status", "tasks", ["status"])


def _task_parts() -> None:
    op.create_table(
        "task_items",
        sa.Column("task_id", sa.String(36), nullable=False),
        sa.Column("items", sa.LargeBinary(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_task_items_task_id_tasks"),
        sa.PrimaryKeyConstraint("task_id", name="pk_task_items"),
    )
    op.create_table(
        "task_events",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("task_id", sa.String(36), nullable=False),
        sa.Column("seq", sa.Integer()),
        sa.Column("time", sa.Float(), nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("is_error", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_task_events_task_id_tasks"),
        sa.PrimaryKeyConstraint("id", name="pk_task_events"),
        sa.UniqueConstraint("task_id", "seq", name="uq_task_events_task_id_seq"),
    )
    op.create_index("ix_task_events_task_id_time", "task_events", ["task_id", "time"])

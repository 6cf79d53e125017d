"""Access rules of collections."""

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "access_rules",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("collection_id", sa.String(36), nullable=False),
        sa.Column("principal_type", sa.String(32), nullable=False),
        sa.Column("principal", sa.String(36), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("permissions", sa.String(2), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float()),
        sa.PrimaryKeyConstraint("id", name="pk_access_rules"),
        sa.ForeignKeyConstraint(
            ["collection_id"], ["collections.id"], name="fk_access_rules_collection_id_collections"
        ),
        sa.UniqueConstraint(
            "collection_id",
            "principal_type",
            "principal",
            "path",
            name="uq_access_rules_collection_id_principal_type_principal_path",
        ),
        sa.CheckConstraint(
            "principal_type IN ('identity', 'group', 'all_authenticated_users', 'anonymous')",
            name="ck_access_rules_principal_type",
        ),
        sa.CheckConstraint("permissions IN ('r', 'rw')", name="ck_access_rules_permissions"),
    )
    op.create_index("ix_access_rules_principal", "access_rules", ["principal"])
    op.create_index("ix_access_rules_expires", "access_rules", ["expires"])

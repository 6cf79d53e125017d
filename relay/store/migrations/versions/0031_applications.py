"""Projects, registrations of clients, policies; secrets have names."""

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("contact_email", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
    )
    op.create_table(
        "project_admins",
        sa.Column("project_id", sa.String(36), nullable=False),
        sa.Column("identity_id", sa.String(36), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "identity_id", name="pk_project_admins"),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name="fk_project_admins_project_id_projects", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["identity_id"], ["identities.id"], name="fk_project_admins_identity_id_identities", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_project_admins_identity_id", "project_admins", ["identity_id"])
    op.create_table(
        "registrations",
        sa.Column("client_id", sa.String(36), nullable=False),
        sa.Column("project_id", sa.String(36), nullable=False),
        sa.Column("client_type", sa.String(48), nullable=False),
        sa.Column("visibility", sa.String(8), nullable=False),
        sa.Column("terms_and_conditions", sa.Text()),
        sa.Column("privacy_policy", sa.Text()),
        sa.Column("preselect_idp", sa.String(36)),
        sa.PrimaryKeyConstraint("client_id", name="pk_registrations"),
        sa.ForeignKeyConstraint(
            ["client_id"], ["clients.id"], name="fk_registrations_client_id_clients", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_registrations_project_id_projects"),
        sa.CheckConstraint("visibility IN ('private', 'public')", name="ck_registrations_visibility"),
    )
    op.create_index("ix_registrations_project_id", "registrations", ["project_id"])
    op.create_table(
        "policies",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("project_id", sa.String(36), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("high_assurance", sa.Boolean(), nullable=False),
        sa.Column("assurance_timeout", sa.Float()),
        sa.Column("required_mfa", sa.Boolean(), nullable=False),
        sa.Column("domains_include", sa.Text()),
        sa.Column("domains_exclude", sa.Text()),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_policies"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_policies_project_id_projects"),
    )
    op.create_index("ix_policies_project_id", "policies", ["project_id"])
    op.add_column("client_secrets", sa.Column("name", sa.Text(), nullable=False, server_default=""))

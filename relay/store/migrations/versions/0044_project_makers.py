"""Projects name who made them, for whom they count."""

import sqlalchemy as sa
from alembic import op

revision = "0044"
down_revision = "0043"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("projects", sa.Column("created_by", sa.String(36)))
    op.create_index("ix_projects_created_by", "projects", ["created_by"])

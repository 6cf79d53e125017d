"""Agents whose machine is lost: from the moment of `revoked` on their links are refused."""

import sqlalchemy as sa
from alembic import op

revision = "0043"
down_revision = "0042"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("revoked", sa.Float(), nullable=True))

"""Recent wrong guesses, so that a restart forgives none."""

import sqlalchemy as sa
from alembic import op

revision = "0041"
down_revision = "0040"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "guess_failures",
        sa.Column("counter", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("times", sa.Text(), nullable=False),
        sa.Column("last", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("counter", "subject", name="pk_guess_failures"),
    )
    op.create_index("ix_guess_failures_last", "guess_failures", ["last"])

"""Applications say whose people they are for, and which application registered them."""

import sqlalchemy as sa
from alembic import op

revision = "0040"
down_revision = "0032"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("registrations", sa.Column("required_idp", sa.String(36)))
    # Written out, because Alembic would rebuild the table for the foreign key.
    op.execute(
        "ALTER TABLE registrations ADD COLUMN registered_by VARCHAR(36) "
        "CONSTRAINT fk_registrations_registered_by_clients REFERENCES clients (id)"
    )
    op.create_index("ix_registrations_registered_by", "registrations", ["registered_by"])

"""What is asked of all tasks that are not over, or of those of one person, is answered by an index."""

from alembic import op

revision = "0042"
down_revision = "0041"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_tasks_status", "tasks")
    op.create_index("ix_tasks_owner_id_status_requested", "tasks", ["owner_id", "status", "requested"])
    op.create_index("ix_tasks_status_deadline", "tasks", ["status", "deadline"])
    op.create_index("ix_tasks_status_desired_ticket_issued", "tasks", ["status", "desired", "ticket_issued"])
    op.create_index("ix_identities_status", "identities", ["status"])

"""Bring a database to the schema of this version, whichever version made it.

Runs at every start of the relay and is harmless when there is nothing to do. All steps are one transaction under
the database's write lock: two processes that start at once do not collide, and a kill leaves the old schema.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from protocol.errors import NeedsPerson


class SchemaTooNew(NeedsPerson):
    """A newer version of the relay has upgraded this database; the older one would damage it."""

    default_code = "DATABASE_TOO_NEW"


def configuration() -> Config:
    """Where Alembic finds the migrations."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return made


def upgrade(engine: Engine) -> None:
    """Apply the missing migrations. Raises `SchemaTooNew`; SQLAlchemy errors when the file is no database."""
    scripts = configuration()
    known = {script.revision for script in ScriptDirectory.from_config(scripts).walk_revisions()}
    with engine.begin() as connection:
        present = set(MigrationContext.configure(connection).get_current_heads())
        if not present <= known:
            raise SchemaTooNew(
                "This database was last used by a newer version of towpath-relay; "
                "install that version or restore a backup.",
                who="relay operator",
            )
        scripts.attributes["connection"] = connection
        command.upgrade(scripts, "head")


def current_revision(engine: Engine) -> str | None:
    """The newest migration applied, or None for an empty database."""
    with engine.begin() as connection:
        return MigrationContext.configure(connection).get_current_revision()

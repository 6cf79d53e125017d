"""Bring a database to the schema of this version, whichever version made it.

Runs at every start of the relay and is harmless when there is nothing to do. All steps are one transaction under
the database's write lock: two processes that start at once do not collide, and a kill leaves the old schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DatabaseError

from protocol.errors import NeedsPerson
from relay.store.database import raise_explained

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"


class NoDatabase(NeedsPerson):
    """There is no database where one should be; an empty one would know nobody and turn every agent away."""

    default_code = "NO_DATABASE"


class SchemaTooNew(NeedsPerson):
    """A newer version of the relay has upgraded this database; the older one would damage it."""

    default_code = "DATABASE_TOO_NEW"


def configuration() -> Config:
    """Where Alembic finds the migrations."""
    from alembic.config import Config

    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return made


def newest_revision() -> str:
    """The revision this version brings databases to: files are named after theirs, and these are numbers."""
    return max(path.name for path in (MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]


def _revisions(connection: Connection) -> list[str]:
    if connection.execute(text("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")).first() is None:
        return []
    return list(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())


def require(engine: Engine, file: Path) -> None:
    """Raise `NoDatabase` unless the file holds a relay's database, and `StoreBroken` when it cannot be read."""
    if not file.exists() or not file.stat().st_size or current_revision(engine) is None:
        raise NoDatabase(
            f"{file} holds no database of a relay: see `database.file` in the configuration, and whether its disk is "
            "mounted. If it is lost, restore a backup; only a relay that nobody has used yet is made anew with "
            "`towpath-relay init`.",
            who="relay operator",
        )


def upgrade(engine: Engine) -> None:
    """Apply the missing migrations. Raises `SchemaTooNew`, `StoreBusy` and `StoreBroken`."""
    try:
        _upgrade(engine)
    except DatabaseError as error:
        raise_explained(error)
        raise


def _upgrade(engine: Engine) -> None:
    with engine.begin() as connection:
        if _revisions(connection) == [newest_revision()]:
            # Nearly every start: Alembic, a sixth of what a relay loads, is not needed.
            return
    from alembic import command
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

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
    """The newest migration applied, or None for an empty database. Raises `StoreBusy` and `StoreBroken`."""
    try:
        with engine.begin() as connection:
            return next(iter(_revisions(connection)), None)
    except DatabaseError as error:
        raise_explained(error)
        raise

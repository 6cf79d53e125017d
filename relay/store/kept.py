"""How much the relay keeps: numbers of rows and bytes, for its operator."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select

from relay.store import transfer_tables as tables


def numbers_of_rows(connection: Connection) -> dict[str, Any]:
    """Agents that may come, and tasks that are not over by what is to become of them; those by an index alone."""
    node, task = tables.nodes.c, tables.tasks.c
    living = (
        select(task.desired, func.count().label("number"))
        .where(task.status.in_(("ACTIVE", "INACTIVE")))
        .group_by(task.desired)
    )
    counted = dict.fromkeys(("run", "pause", "cancel"), 0)
    return {
        "nodes": connection.execute(select(func.count()).where(node.revoked.is_(None))).scalar_one(),
        "tasks": counted | {row.desired: row.number for row in connection.execute(living)},
    }


def numbers_of_files(database: Path) -> dict[str, int]:
    """Bytes of the database with its log, and bytes free beside it; what cannot be told is left out."""
    found: dict[str, int] = {}
    size = 0
    for end in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            size += database.with_name(database.name + end).stat().st_size
    found["database_bytes"] = size
    with contextlib.suppress(OSError):
        found["free_bytes"] = shutil.disk_usage(database.parent).free
    return found

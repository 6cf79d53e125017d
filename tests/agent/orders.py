"""Orders of tasks that are not run, for what only reads where they lead."""

from __future__ import annotations

from typing import Literal

from protocol.control import Party, TaskItem, TaskOptions, TaskOrder


def order_of(
    *paths: str,
    collection: str = "c",
    kind: Literal["TRANSFER", "DELETE"] = "TRANSFER",
    options: TaskOptions | None = None,
) -> TaskOrder:
    """A task that writes to (or deletes) these paths."""
    delete = kind == "DELETE"
    return TaskOrder(
        task_id="t",
        revision=1,
        desired="run",
        type=kind,
        ticket="",
        session_id="s",
        destination=Party(endpoint_id="e", node_id="n", collection_id=collection, certificate=""),
        options=options or TaskOptions(),
        items=[
            TaskItem(source_path=path if delete else "/", destination_path="" if delete else path) for path in paths
        ],
    )

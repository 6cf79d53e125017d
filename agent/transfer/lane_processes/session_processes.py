"""How many processes receive for one task, where the owner of the machine leaves that to the task."""

from __future__ import annotations

from agent.transfer.processes.spawn import AUTO
from protocol.control import TaskOrder

# So many single files are like a tree.
MANY_ITEMS = 32


def lane_processes(wanted: int, order: TaskOrder, processors: int) -> int:
    """How many lane processes are to help a task's worker on a machine with so many processors. ``wanted`` is what
    `spawn.session_processes` says.

    By themselves one, and only for what may be many files: a few large ones are not faster with it, and one small file
    costs half as much again. More than one were never measured, since a source does not keep two busy.
    """
    options = order.options
    if order.type != "TRANSFER" or options.preserve_xattrs or options.preserve_acls:
        # Handles from the worker are not enough for these.
        return 0
    if wanted != AUTO:
        return wanted - 1
    items = order.items or []
    # None: it is found out whether that is a folder.
    many = len(items) >= MANY_ITEMS or any(item.recursive is not False for item in items)
    return 1 if many and processors > 1 else 0

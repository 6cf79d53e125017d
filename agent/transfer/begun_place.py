"""The place where a task has begun: its root, and the disks mounted below, as the journal remembers them."""

from __future__ import annotations

import msgspec

from agent.storage.base import Root
from agent.transfer.books.journal import Journal
from protocol.names import format_path


def is_elsewhere(root: Root, journal: Journal) -> bool:
    """Whether the root, or a disk below it, is another one than the task began in, and its owner has accepted that. It
    is remembered from now on. Blocks.

    Raises `NeedsPerson` (ROOT_CHANGED) for one that was not accepted: what has arrived is on the other one.
    """
    token, known = root.token().encode(), journal.get("root")
    moved = bool(token) and known is not None and token != known
    if moved:
        root.check_original()
    if token and token != known:
        journal.put("root", token)
    # Of a disk below, only what was accepted is remembered, which may be that there is none any more.
    disks = {format_path(path): disk for path, disk in root.disk_tokens().items()}
    began = journal.get("disks")
    before = msgspec.json.decode(began, type=dict[str, str]) if began is not None else {}
    if disks != before:
        journal.put("disks", msgspec.json.encode(disks))
    return moved or any(disks.get(path) != disk for path, disk in before.items())

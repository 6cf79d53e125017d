"""A collection here, another one there, and files that were seen at some time."""

from __future__ import annotations

from agent.watch.rule import Seen

HERE = "00000000-0000-4000-8000-0000000000a1"
THERE = "00000000-0000-4000-8000-0000000000a2"
NOW = 1_800_000_000.0


def seen(name: bytes, size: int = 1, changed: float = NOW, inode: int = 1, modified: float | None = None) -> Seen:
    """A file whose content was modified then (Unix seconds; None: when it last changed)."""
    moments = [int(moment * 1e9) for moment in (changed if modified is None else modified, changed)]
    return Seen(tuple(name.split(b"/")), (1, inode, size, *moments))

"""Small files that another process has written and holds open, on their way to a final name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent.transfer.basis.jobs import FileJob, Group
from protocol.errors import TowpathError

# Requests and indices in them.
Places = list[tuple[int, list[int]]]


class Holder(Protocol):
    """The process that wrote temporaries. Any thread may call; nothing waits."""

    def check(self, batch: int, places: Places, *, in_memory: bool) -> None:
        """Have temporaries read back and closed; `HeldChecked` comes to the settler. ``in_memory``: they have no copy
        but the one in the page cache."""

    def release(self, places: Places) -> None:
        """Have temporaries closed."""


@dataclass(slots=True, eq=False)
class PackHeld:
    """To the settler: small files lie whole in temporaries of these names, each of which matched its digest. ``holder``
    None: nobody has them open."""

    holder: Holder | None
    r: int
    jobs: list[FileJob]
    indices: list[int]
    names: list[bytes]
    digests: list[bytes]
    # What could not be written: something of it may be there under its name.
    failed: list[tuple[FileJob, bytes, TowpathError]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class HeldChecked:
    """To the settler: a batch was read back. ``bad`` has request and index with the system's number, or 0 for content
    that differs."""

    holder: Holder
    batch: int
    bad: list[tuple[int, int, int]]


@dataclass(slots=True, eq=False)
class HolderLost:
    """To the settler: a process is gone. What it held lies where it was, and is looked at from here; ``orphans`` are
    what it may have written and not told of."""

    holder: Holder
    orphans: list[tuple[Group, bytes]]


def places_of(pairs: Sequence[tuple[int, int]]) -> Places:
    """Pairs of request and index, put together by request."""
    found: dict[int, list[int]] = {}
    for r, index in pairs:
        found.setdefault(r, []).append(index)
    return list(found.items())

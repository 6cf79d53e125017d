"""What the settler keeps together until it is durable, and what its side threads answer with."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.storage.base import Directory
from agent.transfer.jobs import Abandoned, FileJob, Group, LargeFile, Outcome
from agent.transfer.small_files import Temporary


@dataclass(slots=True)
class Settled:
    """What is settled but for the sync of its directories, and then its place in the books."""

    transferred: list[tuple[FileJob, str | None]] = field(default_factory=list)
    linked: list[FileJob] = field(default_factory=list)
    complete: list[LargeFile] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    listed: list[Group] = field(default_factory=list)
    folders: dict[int, Directory] = field(default_factory=dict)
    checked_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.transferred or self.linked or self.outcomes or self.listed or self.checked_bytes)

    def touch(self, group: Group) -> None:
        """A name in this folder is new."""
        self.folders[id(group)] = group.handle


@dataclass(slots=True)
class Batch:
    """To the settler, from the sync thread: these are durable now but for those that failed."""

    files: list[Temporary]
    names: Settled
    failed: list[tuple[Temporary, OSError]] = field(default_factory=list)
    names_durable: bool = False


@dataclass(slots=True)
class Recorded:
    """To the settler, from the sync thread: the names of a batch are in the books."""


@dataclass(slots=True)
class Closed:
    """To the settler, from the checker: the temporary of a file that is tried again is closed."""

    item: Abandoned


@dataclass(slots=True)
class Discarded:
    """To the settler, from the checker: the temporary of a file that is given up is gone."""

    outcome: Outcome
    file: LargeFile

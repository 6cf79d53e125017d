"""What a task's journal (`agent.transfer.books.journal`) hands out and takes: folders, large files in flight, files of
several names, and how names ended."""

from __future__ import annotations

import msgspec

from agent.storage.base import PartMark
from protocol.session import Version

# How a name in `finished` ended; UNCHANGED was found equal by comparing digests, LINKED became one
# more name of a file, KEPT was one already, BARE was transferred without all of its extended attributes.
TRANSFERRED, FAILED, SKIPPED, UNCHANGED, LINKED, KEPT, BARE = 1, 2, 3, 4, 5, 6, 7
# Added to them, so many times what became of the file's access list (`agent.transfer.basis.jobs.ListFate`).
LIST_FATE = 16
# Added to what failed in a folder that was done since, and is counted.
COUNTED_BEFORE = 1024


class DirectoryRow(msgspec.Struct, frozen=True):
    """A directory to be listed. Paths are session paths (components joined by ``/``); ``ancestry`` ends with (device,
    inode) of its source (empty in journals of before); where links are followed, those of the directories above come
    first, by which a loop is noticed. ``again``: it is done, and listed once more for what is missing here."""

    id: int
    item: int
    source: bytes
    destination: bytes
    mtime_ns: int
    ancestry: list[tuple[int, int]] = []
    again: bool = False


class PartialRow(msgspec.Struct, frozen=True):
    """A large file in flight: which of its blocks are durable (and verified) in which temporary."""

    temporary: bytes
    version: Version
    block: int
    done: bytearray
    # The temporary as it was synced when this was written down.
    mark: PartMark | None = None
    # Bitmap of blocks that it has of another version, to be compared before they count; empty where there are none.
    earlier: bytes = b""


def bytes_done(row: PartialRow) -> int:
    """Bytes of the blocks that are done, the last of which may be short."""
    count = int.from_bytes(row.done, "little").bit_count()
    last, rest = divmod(row.version[2], row.block)
    short = row.block - rest if rest and row.done[last >> 3] >> (last & 7) & 1 else 0
    return count * row.block - short


# Device, inode, size and mtime_ns of a file at the destination: making another name of it changes none of them.
Place = tuple[int, int, int, int]


class HardLinkRow(msgspec.Struct, frozen=True, array_like=True):
    """Where a file with several names at the source is here: with which version it came, under which path it was put,
    and what it is, since the path may lead to something else by now."""

    version: Version
    destination: bytes
    place: Place

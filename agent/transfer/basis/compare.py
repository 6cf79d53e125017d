"""What to do about one source entry, given what lies at the destination. Pure decisions, no I/O."""

from __future__ import annotations

import re
from typing import Literal

from agent.storage.node import Node
from protocol.control import TaskOptions
from protocol.session import DIRECTORY, FILE, SYMLINK, Row

Decision = Literal["copy", "skip", "compare digests", "link", "directory", "ignore", "conflict", "unsupported"]

# Sync levels of the Globus transfer document; they are cumulative here: each also copies when a lower one would.
EXISTS, SIZE, MTIME, CHECKSUM = 0, 1, 2, 3


def decide(row: Row, existing: Node | None, options: TaskOptions) -> Decision:
    """What to do about a source row. A link at the destination counts as something that may be replaced.

    ``conflict`` means that a directory stands where a file should be, or the other way round.
    """
    if row.kind == DIRECTORY:
        return "directory" if existing is None or existing.kind in ("dir", "symlink") else "conflict"
    if row.kind == SYMLINK:
        # Without a target it is one that could not be looked at: what it is, and leads to, is not known yet.
        if options.recursive_symlinks != "keep" and (options.recursive_symlinks != "copy" or row.target is not None):
            return "ignore"
        return decide_link(existing, options)
    if row.kind != FILE:
        return "unsupported"
    if existing is None:
        return "copy"
    if existing.kind == "dir":
        return "conflict"
    if options.sync_level == EXISTS:
        # Whatever it is: this level leaves alone what has the name.
        return "skip"
    if existing.kind != "file" or options.sync_level is None:
        return "copy"
    return _by_sync_level(row, existing, options.sync_level)


def decide_link(existing: Node | None, options: TaskOptions) -> Decision:
    """What to do about a link that is to be kept as one. Only the level that leaves alone what is there says anything
    about links."""
    if existing is not None and existing.kind == "dir":
        return "conflict"
    return "skip" if existing is not None and options.sync_level == EXISTS else "link"


def _by_sync_level(row: Row, existing: Node, level: int) -> Decision:
    if row.size != existing.size:
        return "copy"
    if level == SIZE:
        return "skip"
    if level == MTIME:
        # Whole seconds: file systems keep times with different precision.
        return "copy" if row.mtime_ns // 10**9 > existing.mtime_ns // 10**9 else "skip"
    return "compare digests"


def is_another(row: Row, existing: Node, options: TaskOptions, target: bytes | None = None) -> bool:
    """Whether what has a row's name here, in a folder that is listed again, cannot be what this task brought or left
    there: it was there before, and the source gave its name to a file meanwhile, or has another one there by now. Told
    without looking into files, since there may be many; ``target`` is where a link here leads to."""
    if row.kind == SYMLINK:
        # One without a target could not be looked at.
        same = existing.kind == "symlink" and row.target in (target, None)
        return options.recursive_symlinks == "keep" and not same and options.sync_level != EXISTS
    if row.kind != FILE or existing.kind == "dir":
        return True
    decision = decide(row, existing, options)
    if decision == "skip":
        return False
    if existing.kind != "file" or row.size != existing.size or options.sync_level == MTIME:
        return True
    # Some file systems keep times in steps of two seconds.
    return options.preserve_timestamp and abs(row.mtime_ns - existing.mtime_ns) >= 2 * 10**9


# Blocks of a large file: big enough to cost little, small enough that one lost block costs little.
SMALL_FILE = 1024 * 1024
_MIB = 1024 * 1024
_NOT_ALL_DONE = re.compile(rb"[^\xff]")


def block_size(size: int) -> int:
    """How a large file is cut: 1 MiB blocks, larger for very large files so that their number stays bounded."""
    block = _MIB
    while block < 16 * _MIB and size // block > 64 * 1024:
        block *= 2
    return block


def block_count(size: int, block: int) -> int:
    """How many blocks a file of so many bytes has; the last one may be shorter."""
    return -(-size // block)


def missing_ranges(done: bytes | bytearray, size: int, block: int, longest: int) -> list[tuple[int, int]]:
    """Offset and length of what is still to be fetched, cut at ``longest`` bytes (a multiple of ``block``).

    ``done`` is a bitmap, lowest bit first.
    """
    ranges: list[tuple[int, int]] = []
    start: int | None = None
    count = block_count(size, block)
    index = 0
    while index <= count:
        have = index == count or bool(done[index >> 3] >> (index & 7) & 1)
        if not have and start is None:
            start = index
        elif have and start is not None:
            offset, end = start * block, min(index * block, size)
            while offset < end:
                length = min(longest, end - offset)
                ranges.append((offset, length))
                offset += length
            start = None
        if have and not index & 7 and index < count:
            # Holes of very large files: whole bytes of the bitmap at once.
            found = _NOT_ALL_DONE.search(done, index >> 3)
            index = max(index + 1, min(count, found.start() * 8 if found is not None else count))
        else:
            index += 1
    return ranges

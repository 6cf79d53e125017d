"""Holes of sparse files: found at the source, left out of what is asked for, left as holes at the destination.

A block counts as a hole only when no byte of it holds data at the source; it is never sent and never written. The last
block is always sent, so that every file is brought to its size and its end by content.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from agent.transfer.basis.compare import block_count
from protocol.errors import ProtocolError
from protocol.session import Extent

# Smaller files are not worth a question.
WORTH_ASKING = 64 * 1024 * 1024
MAX_EXTENTS = 50_000
# Of a file whose blocks are cut smaller for the sake of its holes: 128 KiB of journal.
MOST_BLOCKS = 1024 * 1024
_LEAST_BLOCK = 1024 * 1024


def data_extents(descriptor: int, size: int, file_system: str = "") -> list[Extent] | None:
    """Offset and length of everything of an open file that is no hole, in order; None where the file system cannot
    tell or there are too many. Raises OSError."""
    # It looks at each page, 17 ms a GiB. Who has reserved memory for a file without writing it is told of no holes.
    if file_system == "tmpfs" and os.fstat(descriptor).st_blocks * 512 >= size:
        return [(0, size)]
    extents: list[Extent] = []
    offset = 0
    while offset < size:
        try:
            begin = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # Nothing but a hole to the end.
                return extents
            if error.errno in (errno.EINVAL, errno.ENOTSUP):
                return None
            raise
        offset = min(os.lseek(descriptor, begin, os.SEEK_HOLE), size)
        if begin >= size:
            break
        extents.append((begin, offset - begin))
        if len(extents) > MAX_EXTENTS:
            return None
    return extents


def check_extents_untrusted(extents: Sequence[Extent], size: int) -> None:
    """Refuse what describes no file of this size. Raises only `ProtocolError`."""
    end = 0
    if len(extents) > MAX_EXTENTS:
        raise ProtocolError("The source describes a file in too many parts.")
    for offset, length in extents:
        if offset < end or length <= 0 or offset + length > size:
            raise ProtocolError("The source describes parts that its file cannot have.")
        end = offset + length


def sparse_block(extents: Sequence[Extent], size: int, usual: int) -> int:
    """How a file of mostly holes is cut: a piece of data takes along at most the rest of its blocks, which are smaller
    than those usual for a file of this size."""
    if sum(length for _, length in extents) > size // 8:
        return usual
    block = _LEAST_BLOCK
    while size // block > MOST_BLOCKS:
        block *= 2
    return min(block, usual)


def mark_holes(done: bytearray, extents: Sequence[Extent], size: int, block: int) -> int:
    """Mark every block without data in a bitmap (lowest bit first), the last one excepted. Bytes of marked blocks."""
    last = block_count(size, block) - 1
    marked = 0
    free = 0
    for offset, length in extents:
        marked += _mark(done, free, min(offset // block, last))
        free = max(free, -(-(offset + length) // block))
    return (marked + _mark(done, free, last)) * block


def _mark(done: bytearray, first: int, end: int) -> int:
    """Set the bits from ``first`` up to ``end``, whole bytes at a time. How many."""
    if end <= first:
        return 0
    index = first
    while index < end and index & 7:
        done[index >> 3] |= 1 << (index & 7)
        index += 1
    whole = (end - index) >> 3
    done[index >> 3 : (index >> 3) + whole] = b"\xff" * whole
    for rest in range(index + 8 * whole, end):
        done[rest >> 3] |= 1 << (rest & 7)
    return end - first

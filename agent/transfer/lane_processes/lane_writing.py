"""What a lane process does with content that has come: checks its digest and writes it through handles it was given."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from agent.meter.time_shares import Doing
from agent.storage.handed import Handed
from agent.transfer.lane_processes import lane_messages as say
from agent.transfer.lane_processes.held_files import HeldFiles
from protocol import lane
from protocol.errors import ProtocolError, RetryLater

# Notes what a lane is about to do.
Note = Callable[[Doing], None]


@dataclass(slots=True)
class PackOrder:
    """Small files that will come. Their temporaries' names begin with ``names``, and they stay open with ``hold``."""

    names: bytes
    files: list[say.ExpectedFile]
    hold: bool
    seen: set[int] = field(default_factory=set)


@dataclass(slots=True)
class RangeOrder:
    """Blocks that will come, in order."""

    file: int
    offset: int
    length: int
    arrived: int = 0


@dataclass(slots=True)
class GivenLargeFile:
    """A handle of the temporary of a large file."""

    descriptor: int
    size: int
    block: int


class Writing:
    """The handles of one session, and what is written through them. One thread calls."""

    def __init__(self, handed: Handed, keep: int) -> None:
        self._handed = handed
        self.folders: dict[int, int] = {}
        self.files: dict[int, GivenLargeFile] = {}
        self.held = HeldFiles(handed, keep)

    def forget(self, folders: Iterable[int], files: Iterable[int]) -> None:
        """Close handles."""
        for folder in folders:
            descriptor = self.folders.pop(folder, -1)
            if descriptor >= 0:
                os.close(descriptor)
        for number in files:
            file = self.files.pop(number, None)
            if file is not None:
                with contextlib.suppress(OSError):
                    # The worker's own sync and close say what the disk could not take.
                    self._handed.close_file(file.descriptor)

    def close(self) -> None:
        """Close everything."""
        self.held.close()
        self.forget(list(self.folders), list(self.files))

    def block(
        self, key: int, header: lane.Block, order: RangeOrder, content: memoryview, note: Note
    ) -> say.BlockWritten:
        """Write a block, if it is good. Raises `ProtocolError` for one that was not asked for."""
        if header.offset != order.offset + order.arrived or not 0 < len(content) <= order.length - order.arrived:
            raise ProtocolError("The source sent a block that was not asked for.")
        file = self.files.get(order.file)
        if file is None:
            raise RetryLater("A block came for a file that is closed.", code="CONNECTION_LOST")
        if header.offset % file.block or len(content) != min(file.block, file.size - header.offset):
            raise ProtocolError("The source sent a block of the wrong size.")
        order.arrived += len(content)
        if header.last and order.arrived != order.length:
            raise ProtocolError("The source ended a range early.")
        note(Doing.DIGEST)
        good, number = lane.digest(content) == header.digest, 0
        if good:
            note(Doing.STORAGE)
            number = self._write(file.descriptor, content, header.offset)
        return say.BlockWritten(
            r=header.r,
            lane=key,
            offset=header.offset,
            length=len(content),
            digest=header.digest,
            damaged=not good,
            number=number,
            last=header.last,
        )

    def _write(self, descriptor: int, content: memoryview, offset: int) -> int:
        try:
            written = 0
            while written < len(content):
                written += self._handed.pwrite(descriptor, content[written:], offset + written)
        except OSError as error:
            return error.errno or errno.EIO
        return 0


class PackWriting:
    """One frame of small files; `answer` says what became of it, however far it got."""

    def __init__(
        self, writing: Writing, key: int, header: lane.Pack, order: PackOrder, content: memoryview, note: Note
    ) -> None:
        self._writing = writing
        self._key = key
        self._header = header
        self._order = order
        self._content = content
        self._note = note
        self._done: list[tuple[int, bytes]] = []
        self._failed: list[say.NotWritten] = []
        self._whole = False

    def write(self) -> None:
        """Write those files that are good. Raises `ProtocolError` for a pack that was not asked for so."""
        header, order = self._header, self._order
        offset = 0
        for packed in header.files:
            offset += self._file(packed, offset)
        if offset != len(self._content):
            raise ProtocolError("The source sent more than it announced.")
        if header.last and len(order.seen) != len(order.files):
            raise ProtocolError("The source left files out of a pack.")
        self._whole = True

    def answer(self) -> say.PackWritten:
        """What is to be told."""
        return say.PackWritten(
            r=self._header.r,
            lane=self._key,
            received=len(self._content),
            done=self._done,
            failed=self._failed,
            held=self._order.hold,
            last=self._whole and self._header.last,
        )

    def _file(self, packed: lane.Packed, offset: int) -> int:
        """One file; how much of the content was its."""
        index, order, header = packed.index, self._order, self._header
        if not 0 <= index < len(order.files) or index in order.seen:
            raise ProtocolError("The source sent a file that was not asked for.")
        expected = order.files[index]
        order.seen.add(index)
        if packed.error is not None:
            self._failed.append(say.NotWritten(index, 0, packed.error))
            return 0
        content = self._content[offset : offset + packed.size]
        if packed.size != expected.size or len(content) != packed.size:
            raise ProtocolError("The source sent a file of another size than it listed.")
        self._note(Doing.DIGEST)
        if lane.digest(content) != packed.digest:
            self._failed.append(say.NotWritten(index))
            return packed.size
        self._note(Doing.STORAGE)
        folder = self._writing.folders.get(expected.folder, -1)
        name = say.temporary_name(order.names, header.r, index)
        held, digest = self._writing.held, packed.digest if order.hold else None
        number = held.write((header.r, index), folder, name, expected, content, digest)
        if number:
            self._failed.append(say.NotWritten(index, number))
        else:
            self._done.append((index, packed.digest))
        return packed.size

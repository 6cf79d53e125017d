"""Records of a folder that are more than memory should hold, put aside on the state directory's disk.

Records are divided by a key into parts, so that those with one key are together and each part can be looked at by
itself (as a hash join does). The file has no name and is gone with the process: nothing is taken from it after a crash.
What is read back is what was written, or an error: memory knows the place, length and checksum of the newest piece of
each part, and each piece, under its checksum, those of the one before.
"""

from __future__ import annotations

import struct
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from agent.transfer.books.state_trouble import StateDamaged, of_system

T = TypeVar("T")

PARTS = 256
# Bytes that wait in memory before they are written: some 4 KiB for each part, which is what one piece then has.
BUFFERED = 1 << 20
_AT_ONCE = 1000
# Where the piece before this one is, its length and checksum, and the number of records in this one.
_HEAD = struct.Struct("<QIII")
# MessagePack's array of a four-byte length.
_ARRAY = b"\xdd"
_NONE = (0, 0, 0)
# How trouble with the file is told, and what is seen of it where files need names.
_NAME = "names"


class Spill(Generic[T]):
    """Records of one kind. Methods block and are called in one thread at a time; every one of them raises
    `StateTrouble`, `StateDamaged` for what was not read back as it was written. After that, and at the end, `close`."""

    def __init__(self, directory: Path, kind: type[T]) -> None:
        self._directory = directory
        self._encode = msgspec.msgpack.Encoder().encode_into
        self._decoder = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._file: FileIO | None = None
        self._end = 0
        # What is not written yet, and the newest piece of each part that is: place, length, checksum.
        self._buffers: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._waiting: Counter[int] = Counter()
        self._newest: dict[int, tuple[int, int, int]] = {}
        self._counts: Counter[int] = Counter()
        self._sizes: Counter[int] = Counter()

    def add(self, records: Iterable[T], key: Callable[[T], bytes]) -> None:
        """Put records aside, each in the part of its key. Raises what ``records`` raises."""
        encode, buffers, waiting, rest = self._encode, self._buffers, self._waiting, iter(records)
        while some := list(islice(rest, _AT_ONCE)):
            for record in some:
                part = hash(key(record)) % PARTS
                encode(record, buffers[part], -1)
                waiting[part] += 1
            if sum(map(len, buffers.values())) >= BUFFERED:
                self._write()

    @property
    def on_disk(self) -> int:
        """Bytes of the file."""
        return self._end

    def count(self, part: int) -> int:
        """How many records a part has."""
        return self._counts[part] + self._waiting[part]

    def size(self, part: int) -> int:
        """Bytes that a part's records take here."""
        return self._sizes[part] + len(self._buffers.get(part, b""))

    def read(self, part: int) -> Iterator[list[T]]:
        """The records of a part, a piece at a time, the newest piece first. Nothing must be added meanwhile."""
        expected = self.count(part)
        waiting = self._waiting[part]
        if waiting:
            yield self._decoded(self._buffers[part], waiting)
        expected -= waiting
        place = self._newest.get(part, _NONE)
        while place != _NONE:
            place, count, body = self._piece(*place)
            expected -= count
            yield self._decoded(body, count)
        if expected:
            raise self._damaged()

    def read_all(self) -> Iterator[list[T]]:
        """The records of all parts."""
        for part in range(PARTS):
            yield from self.read(part)

    def close(self) -> None:
        """Let everything go. Safe to call twice."""
        file, self._file = self._file, None
        self._buffers.clear()
        if file is not None:
            file.close()

    def _write(self) -> None:
        """Write what waits. Nothing of it is let go before it is written."""
        written, end, newest = [], self._end, {}
        for part, body in self._buffers.items():
            piece = _HEAD.pack(*self._newest.get(part, _NONE), self._waiting[part]) + body
            newest[part] = (end, len(piece), zlib.crc32(piece))
            written.append(piece)
            end += len(piece)
        try:
            if self._file is None:
                self._file = _nameless(self._directory)
            self._file.seek(self._end)
            _write_whole(self._file, b"".join(written))
        except OSError as error:
            raise of_system(error, self._directory / _NAME) from error
        self._end = end
        self._newest.update(newest)
        self._counts.update(self._waiting)
        self._sizes.update({part: len(body) for part, body in self._buffers.items()})
        self._buffers.clear()
        self._waiting.clear()

    def _piece(self, offset: int, length: int, checksum: int) -> tuple[tuple[int, int, int], int, memoryview]:
        """The place of the piece before this one, how many records this one has, and they."""
        assert self._file is not None
        try:
            self._file.seek(offset)
            piece = _read_whole(self._file, length)
        except OSError as error:
            raise of_system(error, self._directory / _NAME) from error
        if len(piece) != length or zlib.crc32(piece) != checksum:
            raise self._damaged()
        before_offset, before_length, before_checksum, count = _HEAD.unpack_from(piece)
        return (before_offset, before_length, before_checksum), count, memoryview(piece)[_HEAD.size :]

    def _decoded(self, body: bytearray | memoryview, count: int) -> list[T]:
        try:
            return self._decoder.decode(_ARRAY + count.to_bytes(4, "big") + body)
        except msgspec.MsgspecError as error:
            raise self._damaged() from error

    def _damaged(self) -> StateDamaged:
        return StateDamaged(
            f"What the task put aside in the agent's state directory {self._directory}, to compare the names of a "
            "large folder, was not there any more as it was written. The folder is compared anew, and nothing in it "
            "was deleted; if this comes again, look at the disk.",
            who="destination owner",
        )


def part_of(key: bytes) -> int:
    """In which part the records of a key are, the same for as long as this process lives. Nobody else knows it, so that
    no source can put all of its names into one."""
    return hash(key) % PARTS


def division_of(key: bytes, divisions: int) -> int:
    """In which of so many divisions of its part a key is."""
    return hash(key) // PARTS % divisions


def _nameless(directory: Path) -> FileIO:
    # On Windows, where open files keep their names, it is a wrapper that removes the file.
    return tempfile.TemporaryFile(buffering=0, dir=directory, prefix=_NAME)


def _write_whole(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _read_whole(file: FileIO, length: int) -> bytes:
    """As much of it as there is."""
    found = []
    while length and (some := file.read(length)):
        found.append(some)
        length -= len(some)
    return b"".join(found)

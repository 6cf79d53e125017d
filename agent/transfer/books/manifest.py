"""The manifest of a task: an append-only, compressed list of what was transferred (or left out), read on demand.

A file of frames: four-byte length, four-byte CRC-32, zlib-compressed msgpack array of rows. The journal records how
long the file was at each commit, so a torn tail is cut at the next start. Readers (the daemon) may read while a worker
appends; they stop at the first frame that is not whole. About 40 bytes a file with ordinary names.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from agent.transfer.books.state_trouble import of_system

if sys.platform == "linux":
    _sync_data = os.fdatasync
else:
    # macOS has only the one that also writes down when.
    _sync_data = os.fsync

# The names of both lists in a task's folder.
TRANSFERRED_LIST, SKIPPED_LIST = "transferred.manifest", "skipped.manifest"

_FRAME = struct.Struct(">II")
MAX_FRAME = 64 * 1024 * 1024
ROWS_IN_FRAME = 4096


class TransferredRow(msgspec.Struct, array_like=True, frozen=True):
    """A transferred file. Paths are session paths."""

    source: bytes
    destination: bytes
    size: int
    checksum: str | None = None
    algorithm: str | None = None


class SkippedRow(msgspec.Struct, array_like=True, frozen=True):
    """An item left out because of an error. ``kind`` is a session kind, or -1 when not known."""

    source: bytes
    destination: bytes
    kind: int
    code: str
    details: str
    time: str
    extra: bool = False
    checksum: str | None = None
    algorithm: str | None = None


class ManifestDamaged(ValueError):
    """The list holds something that was never written to it, or less than was."""


RowType = TypeVar("RowType", TransferredRow, SkippedRow)


class ManifestWriter:
    """Appends rows. ``length`` is what the journal must record after `sync`.

    Every method raises `StateTrouble` when the file cannot be written; a new writer then goes on from what the journal
    says.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        self._file = -1
        # Whether the file holds less than the journal says.
        self.lost = False
        try:
            self._open(path, length)
        except OSError as error:
            raise of_system(error, path) from error

    def _open(self, path: Path, length: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            present = os.fstat(self._file).st_size
            if present < length:
                # The journal knows of more rows than the file holds: history is damaged, content is not.
                self.lost, length = True, present
            os.ftruncate(self._file, length)
        except BaseException:
            self.close()
            raise
        self.length = length

    def append(self, rows: list[Any]) -> None:
        """Append rows; durable after `sync`."""
        for start in range(0, len(rows), ROWS_IN_FRAME):
            body = zlib.compress(msgspec.msgpack.encode(rows[start : start + ROWS_IN_FRAME]), 1)
            frame = _FRAME.pack(len(body), zlib.crc32(body)) + body
            try:
                written = 0
                while written < len(frame):
                    written += os.pwrite(self._file, frame[written:], self.length + written)
            except OSError as error:
                raise of_system(error, self._path) from error
            self.length += len(frame)

    def sync(self) -> None:
        """Make what was appended durable."""
        try:
            _sync_data(self._file)
        except OSError as error:
            raise of_system(error, self._path) from error

    def close(self) -> None:
        """Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ManifestPage(msgspec.Struct, Generic[RowType], frozen=True):
    """Some rows, and where to go on (None at the end of what is there)."""

    rows: list[RowType]
    next_marker: str | None


def read_page(
    path: Path, kind: type[RowType], marker: str | None, limit: int, *, complete: bool = False
) -> ManifestPage[RowType]:
    """Rows from ``marker`` (opaque; None for the beginning) on. A missing file has no rows. ``complete``: nobody
    writes to it any more, so that it ends with a whole frame.

    Raises ValueError for a marker that this file never gave out, and `ManifestDamaged`; what comes before the damage
    is given out first.
    """
    offset, skip = _parse_marker(marker)
    rows: list[RowType] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return ManifestPage([], None)
    with file:
        while True:
            file.seek(offset)
            prefix = file.read(_FRAME.size)
            if not prefix:
                return ManifestPage(rows, None)
            length, checksum = _FRAME.unpack(prefix) if len(prefix) == _FRAME.size else (MAX_FRAME, 0)
            body = file.read(min(length, MAX_FRAME))
            torn = len(body) < length
            if torn and not complete and length <= MAX_FRAME:
                # Being written just now.
                return ManifestPage(rows, None)
            if torn or zlib.crc32(body) != checksum:
                if rows:
                    return ManifestPage(rows, f"{offset}.0")
                raise ManifestDamaged("The marker does not point into the manifest, or the manifest is damaged.")
            frame = msgspec.msgpack.decode(zlib.decompress(body), type=list[kind])  # type: ignore[valid-type] # a variable
            wanted = frame[skip : skip + limit - len(rows)]
            rows += wanted
            if skip + len(wanted) < len(frame):
                return ManifestPage(rows, f"{offset}.{skip + len(wanted)}")
            offset += _FRAME.size + length
            skip = 0
            if len(rows) >= limit:
                return ManifestPage(rows, f"{offset}.0")


def _parse_marker(marker: str | None) -> tuple[int, int]:
    if not marker:
        return 0, 0
    offset, _, skip = marker.partition(".")
    if not (offset.isascii() and offset.isdigit() and skip.isascii() and skip.isdigit()) or len(marker) > 40:
        raise ValueError("The marker is not one this task gave out.")
    return int(offset), int(skip)

"""Small files that a lane process has written to temporaries: held open until they are read back or released.

As `agent.transfer.settling.small_files`, but through handles from the worker and without a word on tasks: what fails
is told to the worker by number.
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from agent.storage.handed import Handed
from agent.transfer.lane_processes.lane_messages import ExpectedFile
from protocol.lane import digest as content_digest
from protocol.session import MAX_BLOCK


@dataclass(slots=True)
class _Held:
    """One temporary. ``descriptor`` is -1 when it could not be kept open."""

    folder: int
    name: bytes
    size: int
    digest: bytes
    descriptor: int


@dataclass(slots=True)
class _Asked:
    """A batch of temporaries (None: not held here) that is being read back, and those that are no good so far."""

    number: int
    files: deque[tuple[int, int, _Held | None]]
    bad: list[tuple[int, int, int]] = field(default_factory=list)


class HeldFiles:
    """``keep``: how many descriptors may stay open. Folders are descriptors of this process. One thread calls."""

    def __init__(self, handed: Handed, keep: int) -> None:
        self._handed = handed
        self._keep = keep
        self._open = 0
        self._held: dict[tuple[int, int], _Held] = {}
        # Batches that are to be read back, the oldest first.
        self._asked: deque[_Asked] = deque()
        # Made when the first file is read back: filling it with zeros takes half a millisecond of a task's beginning.
        self._buffer = memoryview(bytearray())

    def write(
        self,
        place: tuple[int, int],
        folder: int,
        name: bytes,
        expected: ExpectedFile,
        content: memoryview,
        digest: bytes | None,
    ) -> int:
        """Write one file to its temporary; the number of what went wrong, or 0. ``place`` is its request and its
        index in that; with no digest it is not held."""
        try:
            descriptor = self._handed.write_whole(folder, name, expected.mode, content, expected.mtime_ns)
            if digest is None or self._open >= self._keep:
                written, descriptor = descriptor, -1
                self._handed.close_file(written)
        except OSError as error:
            return error.errno or errno.EIO
        if digest is not None:
            self._open += descriptor >= 0
            self._held[place] = _Held(folder, name, len(content), digest, descriptor)
        return 0

    @property
    def checking(self) -> bool:
        """Something is left to be read back."""
        return bool(self._asked)

    def ask(self, number: int, files: Iterable[tuple[int, list[int]]], *, in_memory: bool) -> None:
        """Have a batch of temporaries read back by `check`, past the page cache where the system allows and, but for
        ``in_memory``, there is something behind it."""
        wanted = deque((r, index, self._held.pop((r, index), None)) for r, indices in files for index in indices)
        # All are dropped from the cache and asked for before the first is waited for, so that the disk sees a queue,
        # and works while more is received.
        for step in () if in_memory else (self._handed.forget, self._handed.want):
            for _, _, held in wanted:
                if held is not None and held.descriptor >= 0 and held.size:
                    with contextlib.suppress(OSError):
                        # Whatever it is, reading says it.
                        step(held.descriptor)
        self._asked.append(_Asked(number, wanted))

    def check(self, most: int) -> tuple[int, list[tuple[int, int, int]]] | None:
        """Read the next few temporaries back and close them. When a batch is through, its number, and those that are no
        good, with the system's number or 0 for another content."""
        asked = self._asked[0]
        for _ in range(min(most, len(asked.files))):
            r, index, held = asked.files.popleft()
            number = errno.ENOENT if held is None else self._look(held)
            if number is not None:
                asked.bad.append((r, index, number))
        if asked.files:
            return None
        self._asked.popleft()
        return asked.number, asked.bad

    def _look(self, held: _Held) -> int | None:
        """None for one that reads back as it was sent."""
        try:
            if held.descriptor < 0:
                held.descriptor = self._handed.open_temporary(held.folder, held.name)
                self._open += 1
                self._handed.forget(held.descriptor)
            try:
                same = self._reads_back(held)
            finally:
                self._close(held)
        except OSError as error:
            return error.errno or errno.EIO
        return None if same else 0

    def _reads_back(self, held: _Held) -> bool:
        size = held.size
        if len(self._buffer) <= size:
            self._buffer = memoryview(bytearray(max(size + 1, MAX_BLOCK // 8)))
        # One byte more than there should be, so that a file that grew is noticed.
        view = self._buffer[: size + 1]
        read = self._handed.preadv(held.descriptor, view, 0)
        while 0 < read < size:
            more = self._handed.preadv(held.descriptor, view[read:], read)
            if not more:
                break
            read += more
        return read == size and content_digest(view[:size]) == held.digest

    def release(self, files: Iterable[tuple[int, list[int]]]) -> None:
        """Close temporaries without a look."""
        for r, indices in files:
            for index in indices:
                held = self._held.pop((r, index), None)
                if held is not None:
                    with contextlib.suppress(OSError):
                        # What the disk could not take was said by the sync.
                        self._close(held)

    def _close(self, held: _Held) -> None:
        if held.descriptor >= 0:
            descriptor, held.descriptor = held.descriptor, -1
            self._open -= 1
            self._handed.close_file(descriptor)

    def close(self) -> None:
        """Close everything; the files stay, and are the worker's."""
        asked = [held for batch in self._asked for _, _, held in batch.files if held is not None]
        for held in (*self._held.values(), *asked):
            with contextlib.suppress(OSError):
                self._close(held)
        self._held.clear()
        self._asked.clear()

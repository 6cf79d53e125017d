"""How many content bytes a task has received in all, repeats included, in a file that survives a kill of the process.

Where the file system writes files in place, the count lives in a memory-mapped page, so it costs no system call and is
right after SIGKILL; elsewhere storing to such a page on a full disk would kill the process (SIGBUS), and it is written.
It is a statistic and not made durable against power loss. Received minus settled is what interruptions cost.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import threading
from pathlib import Path

from agent.state_files import file_system_of

_COUNT = struct.Struct("<Q")
# What is allocated once is there for every later write.
_IN_PLACE = frozenset({"ext2", "ext3", "ext4", "ramfs", "tmpfs", "xfs"})


class ReceivedCounter:
    """Adds up received bytes; `add` may be called from any thread. Raises OSError when there is no room for it."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._page: mmap.mmap | None = None
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Written, not left as a hole, for which there might be no room when it is stored to.
            known = os.pread(self._file, _COUNT.size, 0)
            self._value = int(_COUNT.unpack(known)[0]) if len(known) == _COUNT.size else 0
            if os.pwrite(self._file, _COUNT.pack(self._value), 0) != _COUNT.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if file_system_of(path.parent) in _IN_PLACE:
                self._page = mmap.mmap(self._file, _COUNT.size)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def value(self) -> int:
        """Bytes received so far."""
        return self._value

    def add(self, size: int) -> None:
        """Count so many bytes more."""
        with self._lock:
            self._put(self._value + size)

    def reset(self) -> None:
        """Begin anew, when nobody knows any more what of it was settled."""
        with self._lock:
            self._put(0)

    def _put(self, value: int) -> None:
        self._value = value
        if self._page is not None:
            self._page[: _COUNT.size] = _COUNT.pack(value)
        elif self._file >= 0:
            # On a full disk the count waits for the next time; whoever needs the disk for more says so.
            with contextlib.suppress(OSError):
                os.pwrite(self._file, _COUNT.pack(value), 0)

    def close(self) -> None:
        """Safe to call twice."""
        with self._lock:
            if self._page is not None:
                self._page.close()
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

"""How many content bytes a task has received in all, repeats included, in a file that survives a kill of the process.

The count lives in a memory-mapped page, so it costs no system call and is right after SIGKILL; it is a statistic and
not made durable against power loss. Received minus settled is what interruptions cost.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from pathlib import Path

_COUNT = struct.Struct("<Q")


class ReceivedCounter:
    """Adds up received bytes; `add` may be called from any thread."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _COUNT.size)
            self._page = mmap.mmap(descriptor, _COUNT.size)
        finally:
            os.close(descriptor)
        self._lock = threading.Lock()

    @property
    def value(self) -> int:
        return int(_COUNT.unpack(self._page[: _COUNT.size])[0])

    def add(self, size: int) -> None:
        with self._lock:
            self._page[: _COUNT.size] = _COUNT.pack(self.value + size)

    def reset(self) -> None:
        """Begin anew, when nobody knows any more what of it was settled."""
        with self._lock:
            self._page[: _COUNT.size] = _COUNT.pack(0)

    def close(self) -> None:
        """Safe to call twice."""
        self._page.close()

"""Files and folders whose handles were opened, and checked, in another process and handed over: the steps of writing
temporaries and reading them back, and nothing by which one could come anywhere else."""

from __future__ import annotations

import os

from agent.storage import handles, page_cache
from agent.storage.base import Bytes


class Handed:
    """Each method is what `Root` and `Directory` call so, with bare descriptors. They block and raise OSError."""

    def write_whole(self, folder: int, name: bytes, mode: int, content: memoryview, mtime_ns: int | None) -> int:
        """Make a temporary with a mode, a content and a modification time (None: now). Its descriptor, which is the
        caller's; after an error there is none, but the temporary may be there."""
        return handles.fill_temporary(handles.create_temporary(folder, name, mode), content, mtime_ns, self.pwrite)

    def open_temporary(self, folder: int, name: bytes) -> int:
        """Open an existing temporary of ours to be read."""
        return handles.open_temporary(folder, name)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> int:
        """`os.pwrite`: may write less than asked for."""
        return os.pwrite(fd, data, offset)

    def preadv(self, fd: int, buffer: memoryview, offset: int) -> int:
        """`os.preadv`: may read less than asked for; 0 at the end of the file."""
        return os.preadv(fd, (buffer,), offset)

    def forget(self, fd: int) -> None:
        """See `agent.storage.page_cache`."""
        page_cache.forget(fd)

    def want(self, fd: int) -> None:
        """See `agent.storage.page_cache`."""
        page_cache.want(fd)

    def close_file(self, fd: int) -> None:
        """`os.close`; a delayed write error may surface here."""
        os.close(fd)

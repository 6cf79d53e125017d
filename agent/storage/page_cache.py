"""Reading past the page cache, as far as a system allows: what was written is read from the device, not from memory."""

from __future__ import annotations

import os
import sys

if sys.platform == "darwin":
    import fcntl

    def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Have the next reads of this file come from its device. macOS knows this only for all of an open file.

        Raises OSError.
        """
        del offset, length
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)

    def want(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Say that these bytes will be read. macOS has no word for that which does not wait."""

    def write_soon(descriptor: int, offset: int, length: int) -> None:
        """Nothing, as `want`."""

elif sys.platform == "win32":

    def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Nothing: Windows decides this when a file is opened."""

    def want(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Nothing, as `forget`."""

    def write_soon(descriptor: int, offset: int, length: int) -> None:
        """Nothing, as `forget`."""

else:

    def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Have the next reads of these bytes (to the end if ``length`` is 0) come from the device. Raises OSError."""
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def want(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Say that these bytes (to the end if ``length`` is 0) will be read, so that the device has a queue. Raises
        OSError."""
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def write_soon(descriptor: int, offset: int, length: int) -> None:
        """Have these bytes written to the device without waiting for it: no sync, only less for the next one to do.
        Raises OSError."""
        # What is dirty cannot be dropped, so that the kernel begins to write it.
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

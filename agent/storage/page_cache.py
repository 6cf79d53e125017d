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

    def want(descriptor: int) -> None:
        """Say that the file will be read. macOS has no word for that which does not wait."""

elif sys.platform == "win32":

    def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Nothing: Windows decides this when a file is opened."""

    def want(descriptor: int) -> None:
        """Nothing, as `forget`."""

else:

    def forget(descriptor: int, offset: int = 0, length: int = 0) -> None:
        """Have the next reads of these bytes (to the end if ``length`` is 0) come from the device. Raises OSError."""
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def want(descriptor: int) -> None:
        """Say that the file will be read, so that the device has a queue. Raises OSError."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)

"""How many files this process may have open at a time, and how much memory it may take."""

from __future__ import annotations

import contextlib
import sys

if sys.platform == "win32":
    # What the C library gives a program; its own limit of 512 is for streams, which Python does not use.
    _FILES = 8192

    def open_files() -> int:
        """The limit that holds now."""
        return _FILES

    def raise_open_files(wanted: int) -> int:
        """Nothing to raise; the limit that holds."""
        del wanted
        return _FILES

    def bound_memory(most: int) -> None:
        """Nothing can be bounded so."""
        del most

else:
    import resource

    def open_files() -> int:
        """The limit that holds now."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def raise_open_files(wanted: int) -> int:
        """Raise the soft limit towards the hard one, as far as ``wanted``; the limit that holds then."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        if soft != resource.RLIM_INFINITY and soft < most:
            # macOS refuses what its kernel has no room for, whatever the hard limit says.
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return open_files()

    def bound_memory(most: int) -> None:
        """Have this process fail when its own memory (what is not shared with files) exceeds ``most`` bytes.

        Linux counts all private memory for that, other systems none of it, or little.
        """
        with contextlib.suppress(OSError, ValueError):
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            soft = most if hard == resource.RLIM_INFINITY else min(hard, most)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

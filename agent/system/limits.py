"""How many files this process may have open at a time."""

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

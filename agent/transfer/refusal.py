"""Whether a file system refuses an attribute or an access list for good, or has another trouble that may pass."""

from __future__ import annotations

import errno

from agent.storage.base import Root

# With less room than this (bytes) a refusal for want of space is the disk's, not that of one file's attributes.
_ROOM = 1024 * 1024
# What says that a file system does not take this one, or none; everything else is the file's own trouble. EBADF: a
# folder that may be passed through and written to, but not read, is open for nothing else.
_REFUSED = frozenset(
    {
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.EBADF,
        errno.E2BIG,
        errno.ERANGE,
        errno.EINVAL,
        errno.ENAMETOOLONG,
    }
)


def is_refusal(root: Root, error: OSError) -> bool:
    """Whether setting it again would fail again, by what it is or where. Raises OSError of a look at the free space."""
    return error.errno in _REFUSED or (error.errno == errno.ENOSPC and root.free_bytes() >= _ROOM)

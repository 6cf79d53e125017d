"""Whether a file system refuses an attribute or an access list for good, or has another trouble that may pass."""

from __future__ import annotations

import errno

from agent.storage.access_lists import REFUSED
from agent.storage.base import Root

# With less room than this (bytes) a refusal for want of space is the disk's, not that of one file's attributes.
_ROOM = 1024 * 1024


def is_refusal(root: Root, error: OSError) -> bool:
    """Whether setting it again would fail again, by what it is or where. Raises OSError of a look at the free space."""
    return error.errno in REFUSED or (error.errno == errno.ENOSPC and root.free_bytes() >= _ROOM)

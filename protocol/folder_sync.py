"""Names in folders that outlive a power failure, on whatever file system."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

# How file systems without a sync of folders refuse it (shared folders of virtual machines, some file servers).
NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def sync_names(folder: Path) -> None:
    """Make the names in a folder durable; together with all else where its file system knows no such step for a folder
    alone. Blocks. Raises OSError."""
    if sys.platform == "win32":
        # No folder can be opened there, nor need it be.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        os.sync()
    finally:
        os.close(descriptor)

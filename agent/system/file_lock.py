"""Exclusive locks on open files, held until the file is closed, whatever happens to the process.

POSIX: ``flock(2)``, which belongs to the open file, not to the process. Windows: ``msvcrt.locking`` (LockFile) on one
byte far behind any content, because Windows' locks keep others from reading what they cover; none are shared.
"""

from __future__ import annotations

import errno
import os
import sys
import time

# What file systems without locks answer (Lustre mounted without `flock`, some FUSE).
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_BYTE = 1 << 30
_AGAIN = 0.05

if sys.platform == "win32":
    import msvcrt

    # A lock of somebody else; on POSIX the same numbers are a security module's refusal.
    _TAKEN = frozenset({errno.EACCES, errno.EDEADLK})

    def _lock(descriptor: int, *, shared: bool) -> None:
        del shared
        os.lseek(descriptor, _BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    _TAKEN = frozenset({errno.EAGAIN})

    def _lock(descriptor: int, *, shared: bool) -> None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Take the lock at once. True: taken; False: somebody else has it; None: this file system has no locks.

    Raises OSError for anything else.
    """
    try:
        _lock(descriptor, shared=shared)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def wait_for_lock(descriptor: int) -> bool:
    """Wait until the lock is taken; False at once where the file system has none. Blocks. Raises OSError."""
    while (taken := try_lock(descriptor)) is False:
        time.sleep(_AGAIN)
    return bool(taken)

"""Files that hold secrets, or what depends on them: written whole, durable, for their owner alone."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from protocol.folder_sync import sync_names

# Windows would change the ends of lines.
_BINARY = getattr(os, "O_BINARY", 0)


def write_private_file(path: Path, data: bytes) -> None:
    """Write a secret so that it appears whole, durable and readable by its owner alone.

    Root, which may be an operator beside a service of another user, leaves it to whom the former one belonged: else the
    service could not read its own key any more.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _keep_owner(path, file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_names(path.parent)


def _keep_owner(former: Path, descriptor: int) -> None:
    if not hasattr(os, "fchown") or os.geteuid() != 0:
        return
    try:
        status = os.lstat(former)
    except OSError:
        return
    if stat.S_ISREG(status.st_mode):
        os.fchown(descriptor, status.st_uid, status.st_gid)

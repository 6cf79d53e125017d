"""Back-up and restoring: one archive with the database, the keys, the certificates and the configuration.

The database part is a consistent picture taken by SQLite's online backup, also while the relay serves. The archive
holds every secret of the relay; it is written with mode 0600 and appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
import time
from pathlib import Path, PurePosixPath

from protocol.errors import NeedsPerson
from relay.lock import exclusive
from relay.settings import Settings

DATABASE = "relay.sqlite"
_FOLDERS = ("keys", "tls")
_MAX_MEMBERS = 1000


class BackupRefused(NeedsPerson):
    """Backing up or restoring would lose something or is impossible; the sentence says why."""

    default_code = "BACKUP"


def back_up(settings: Settings, configuration: Path, target: Path) -> int:
    """Write a backup to ``target`` and return its size in bytes. Raises `BackupRefused`, OSError, sqlite3.Error."""
    database = settings.directory_path / settings.database.file
    if not database.exists():
        raise BackupRefused(f"{database} does not exist; there is nothing to back up.", who="relay operator")
    if target.exists():
        raise BackupRefused(f"{target} exists already; choose another name.", who="you")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file, tempfile.TemporaryDirectory(dir=settings.directory_path) as scratch:
            copy = Path(scratch) / DATABASE
            _copy_database(database, copy)
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
                archive.add(copy, DATABASE)
                archive.add(configuration, "relay.yaml")
                for folder in _FOLDERS:
                    if (settings.directory_path / folder).exists():
                        archive.add(settings.directory_path / folder, folder)
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link does not replace what somebody else put there meanwhile.
        os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)
    return target.stat().st_size


def restore(archive: Path, directory: Path, *, force: bool) -> Path | None:
    """Put a backup's content into ``directory``. Returns where the former content was moved to, if there was any.

    Never touches a directory on which a relay runs; replaces the content of another only with ``force``, and keeps it.
    Raises `AlreadyRunning`, `BackupRefused`, OSError, tarfile.TarError.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(directory):
        names = (DATABASE, DATABASE + "-wal", DATABASE + "-shm", "relay.yaml", *_FOLDERS)
        present = [name for name in names if (directory / name).exists()]
        if present and not force:
            raise BackupRefused(
                f"{directory} holds a relay already ({', '.join(present)}); --force moves it aside.", who="you"
            )
        scratch = directory / f".restore-{secrets.token_hex(4)}"
        scratch.mkdir(mode=0o700)
        try:
            _unpack_untrusted(archive, scratch)
            _check_database(scratch / DATABASE)
            aside = _move_aside(directory, present) if present else None
            # The database last: without it nothing serves what is only half restored.
            for name in sorted(os.listdir(scratch), key=lambda name: name == DATABASE):
                (scratch / name).rename(directory / name)
            _sync_directory(directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return aside


def _copy_database(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as reading,
        contextlib.closing(sqlite3.connect(target)) as writing,
    ):
        reading.backup(writing)
        # The copy travels as one file, so it must not need a log beside it.
        writing.execute("PRAGMA journal_mode = DELETE")
    target.chmod(0o600)
    _check_database(target)


def _check_database(path: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            verdict = connection.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        raise BackupRefused(f"The database of the backup cannot be read: {error}.", who="relay operator") from error
    if verdict != "ok":
        raise BackupRefused(f"The database is damaged: {verdict}.", who="relay operator")


def _unpack_untrusted(archive: Path, into: Path) -> None:
    with tarfile.open(archive, "r:gz") as source:
        for count, member in enumerate(source, start=1):
            parts = PurePosixPath(member.name).parts
            known = parts[:1] and parts[0] in (DATABASE, "relay.yaml", *_FOLDERS)
            if count > _MAX_MEMBERS or not known or not (member.isfile() or member.isdir()):
                raise BackupRefused(f"{archive} is no backup of a relay (it contains {member.name!r:.100}).")
            source.extract(member, into, filter="data", set_attrs=False)
    for path in into.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not (into / DATABASE).is_file():
        raise BackupRefused(f"{archive} is no backup of a relay: it holds no database.")


def _move_aside(directory: Path, names: list[str]) -> Path:
    aside = directory / time.strftime("replaced-%Y%m%dT%H%M%S", time.gmtime())
    aside.mkdir(mode=0o700)
    # The database first, with its log: from then on the directory holds no relay until the restored one is there.
    for name in sorted(names, key=lambda name: not name.startswith(DATABASE)):
        (directory / name).rename(aside / name)
    _sync_directory(aside)
    return aside


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

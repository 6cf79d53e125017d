"""Back-up and restoring: one archive with the database, the keys, the certificates and the configuration.

The database part is a consistent picture taken by SQLite's online backup, also while the relay serves. The archive
holds every secret of the relay; it is written with mode 0600 and appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import secrets
import sqlite3
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from protocol.errors import NeedsPerson
from protocol.folder_sync import sync_names
from protocol.private_file import write_private_file
from relay.lock import LOCK, exclusive, lock_of
from relay.replacement import (
    PLAN,
    Plan,
    Unfinished,
    beside,
    clear,
    clear_left_beside,
    give_to_owner_of,
    move,
    moves,
    put_back,
    replace,
    write_private,
)
from relay.settings import Settings, parse

# Names inside the archive.
DATABASE = "relay.sqlite"
CONFIGURATION = "relay.yaml"
_FOLDERS = ("keys", "tls")
_MAX_MEMBERS = 1000
_SCRATCH = ".restore-"
_MAX_CONFIGURATION = 1 << 20


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
    if not target.parent.is_dir():
        raise BackupRefused(f"There is no folder {target.parent} to write {target.name} in; make it first.", who="you")
    before = database.stat()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file, tempfile.TemporaryDirectory(dir=settings.directory_path) as scratch:
            copy = Path(scratch) / DATABASE
            _copy_database(database, copy)
            with tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
                archive.add(copy, DATABASE)
                archive.add(configuration, CONFIGURATION)
                for folder in _FOLDERS:
                    if (settings.directory_path / folder).exists():
                        archive.add(settings.directory_path / folder, folder)
            file.flush()
            os.fsync(file.fileno())
        # A restore takes the database away first and puts its own in place last.
        if not database.exists() or not os.path.samestat(before, database.stat()):
            raise BackupRefused("A restore has replaced this relay meanwhile; take the backup again.", who="you")
        # Unlike a rename, a link does not replace what somebody else put there meanwhile.
        os.link(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_names(target.parent)
    return target.stat().st_size


def restore(
    archive: Path, directory: Path, *, force: bool, note: Callable[[Path], None] = lambda _database: None
) -> Path | None:
    """Put a backup in place: the configuration into ``directory``, everything else where it says.

    Returns where the former content was moved to, if there was any. Never touches a directory on which a relay runs;
    replaces the content of another only with ``force``, and keeps it. What fails leaves all as it was; what was killed
    is undone first by the next call (`relay.replacement`). ``note`` is called with the database's file before it is put
    in place, and may write into it. Raises `AlreadyRunning`, `BackupRefused`, `Unfinished`, `SettingsError`, OSError.
    """
    text = _read_configuration_untrusted(archive)
    settings = parse(text, f"relay.yaml in {archive.name}")
    home = directory.resolve()
    put_back(home)
    place = (home / Path(settings.directory).expanduser()).resolve()
    database = place / settings.database.file
    for folder in (place, database.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(place, database):
        configuration = home / CONFIGURATION
        # Of a restore that was killed while it unpacked.
        clear(*place.glob(f"{_SCRATCH}*"))
        for path in (database, configuration, home / PLAN):
            clear_left_beside(path)
        known = [database, *(database.with_name(database.name + end) for end in ("-wal", "-shm"))]
        known += [configuration, *(place / folder for folder in _FOLDERS)]
        _find_present(place, known, force=force)
        scratch = place / f"{_SCRATCH}{secrets.token_hex(4)}"
        scratch.mkdir(mode=0o700)
        # Each beside its place, which may be on another disk than all else: there it is put in place by a rename.
        ready = {path: beside(path) for path in (configuration, database)}
        try:
            _unpack_untrusted(archive, scratch)
            _check_database(scratch / DATABASE)
            note(scratch / DATABASE)
            move(scratch / DATABASE, ready[database])
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private_file(ready[configuration], text.encode())
            folders = [(scratch / name, place / name) for name in _FOLDERS if (scratch / name).exists()]
            give_to_owner_of(place, [*ready.values(), *(made for made, _ in folders), place / LOCK, lock_of(database)])
            aside = _name_of_aside(place)
            # Only now: a command that looks into the database meanwhile leaves a log beside it, which is not to be
            # taken for that of the new one.
            present = _find_present(place, known, force=force)
            new = [*folders, *((path, target) for target, path in ready.items())]
            old = [(path, aside / path.name) for path in present]
            replace(home, Plan(place, aside, scratch, moves(old), moves(new)))
        except Unfinished:
            # Putting back what was there goes on from these.
            raise
        except BaseException:
            clear(scratch, *ready.values())
            raise
        clear(scratch)
    return aside if present else None


def _find_present(place: Path, known: list[Path], *, force: bool) -> list[Path]:
    """Those that are there, symlinks that lead nowhere among them. Raises `BackupRefused` without ``force``."""
    present = [path for path in known if os.path.lexists(path)]
    if present and not force:
        names = ", ".join(path.name for path in present)
        raise BackupRefused(f"{place} holds a relay already ({names}); --force moves it aside.", who="you")
    return present


def _name_of_aside(place: Path) -> Path:
    name = time.strftime("replaced-%Y%m%dT%H%M%S", time.gmtime())
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(place / name for name in names if not os.path.lexists(place / name))


def _read_configuration_untrusted(archive: Path) -> str:
    """The configuration of an archive, all of which is read, up to the checksum behind the last byte: tarfile stops
    before, and takes damage for the end. Raises `BackupRefused`."""
    content = None
    try:
        with gzip.open(archive) as plain:
            with tarfile.open(fileobj=plain, mode="r:") as source:
                for member in source:
                    if member.name == CONFIGURATION:
                        fits = member.isfile() and member.size <= _MAX_CONFIGURATION
                        file = source.extractfile(member) if fits else None
                        content = None if file is None else file.read()
            while plain.read(1 << 20):
                pass
    except EOFError as error:
        raise BackupRefused(f"{archive} is cut short; use another copy of the backup.", who="you") from error
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error) as error:
        raise BackupRefused(f"{archive} cannot be read as a backup: {error}.", who="you") from error
    if content is None:
        raise BackupRefused(f"{archive} is no backup of a relay: it holds no configuration.")
    return content.decode(errors="replace")


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
            known = parts[:1] and parts[0] in (DATABASE, CONFIGURATION, *_FOLDERS) and ".." not in parts
            if count > _MAX_MEMBERS or not known or not (member.isfile() or member.isdir()):
                raise BackupRefused(f"{archive} is no backup of a relay (it contains {member.name!r:.100}).")
            _unpack_one_untrusted(source, member, into.joinpath(*parts))
    for path in into.rglob("*"):
        if path.is_dir():
            sync_names(path)
    if not (into / DATABASE).is_file():
        raise BackupRefused(f"{archive} is no backup of a relay: it holds no database.")


def _unpack_one_untrusted(source: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write a file or make a folder, readable by the owner alone. Tarfile's own filters came with Python 3.11.4 only,
    and nothing of a member but name and content is wanted here."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = source.extractfile(member)
    if content is None:
        path.mkdir(mode=0o700, exist_ok=True)
        return
    with content:
        write_private(content, path)

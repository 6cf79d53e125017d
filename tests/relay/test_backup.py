"""Backups: complete, consistent, private; restoring loses nothing that was there."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sqlite3
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from protocol.errors import NeedsPerson
from relay import backup
from relay.auth.identities import add_identity, select_by_usernames
from relay.backup import BackupRefused, back_up, restore
from relay.keys import RelayKeys
from relay.lock import AlreadyRunning, exclusive
from relay.server import serve
from relay.settings import Settings
from relay.settings import load as load_settings
from relay.store.database import Store


async def add(store: Store, name: str) -> None:
    await store.write(partial(add_identity, username=name, now=1.0, provider_id="p"))


async def users(settings: Settings, *names: str) -> set[str]:
    store = Store(settings.database_url)
    try:
        return set(await store.read(lambda connection: select_by_usernames(connection, names)))
    finally:
        store.close()


async def test_a_backup_taken_while_the_relay_writes_restores_elsewhere(
    relay_settings: Settings, relay_store: Store, relay_directory: Path, tmp_path: Path
) -> None:
    await add(relay_store, "before@x")
    archive = tmp_path / "backup.tgz"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, back_up, relay_settings, relay_directory / "relay.yaml", archive)
        for index in range(20):
            await add(relay_store, f"during{index}@x")
    await add(relay_store, "after@x")
    assert archive.stat().st_mode & 0o777 == 0o600
    target = tmp_path / "restored"
    assert restore(archive, target, force=False) is None
    restored = load_settings(target / "relay.yaml")
    assert await users(restored, "before@x", "after@x") == {"before@x"}
    theirs, ours = (RelayKeys(place / "keys") for place in (relay_directory, target))
    assert (theirs.relay_id, theirs.root_public_pem, theirs.jwk_set) == (
        ours.relay_id,
        ours.root_public_pem,
        ours.jwk_set,
    )
    secret = [path for path in target.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o077 for path in secret} == {0}


async def test_restoring_over_a_relay_needs_force_and_keeps_the_old_one(
    relay_settings: Settings, relay_store: Store, relay_directory: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "backup.tgz"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    await add(relay_store, "later@x")
    relay_store.close()
    with pytest.raises(BackupRefused, match="--force"):
        restore(archive, relay_directory, force=False)
    assert await users(relay_settings, "later@x") == {"later@x"}
    aside = restore(archive, relay_directory, force=True)
    assert await users(relay_settings, "later@x") == set()
    assert aside is not None
    kept = sqlite3.connect(aside / "relay.sqlite")
    assert kept.execute("SELECT username FROM identities").fetchall() == [("later@x",)]
    kept.close()


@pytest.mark.parametrize("force", [False, True])
def test_a_running_relay_is_never_touched(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, force: bool
) -> None:
    archive = tmp_path / "backup.tgz"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    with exclusive(relay_directory), pytest.raises(AlreadyRunning):
        restore(archive, relay_directory, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_restore_elsewhere_leaves_the_database_of_a_running_relay_alone(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, force: bool
) -> None:
    """The configuration in the backup names the database by its whole path."""
    database = relay_directory / "relay.sqlite"
    configuration = relay_directory / "relay.yaml"
    configuration.write_text(f"directory: .\ndatabase: {{file: {tmp_path / 'db' / 'main.sqlite'}}}\n")
    (tmp_path / "db").mkdir()
    database = database.rename(tmp_path / "db" / "main.sqlite")
    settings, archive = load_settings(configuration), tmp_path / "backup.tgz"
    back_up(settings, configuration, archive)
    inode = database.stat().st_ino
    (tmp_path / "elsewhere").mkdir()
    with exclusive(settings.directory_path, database), pytest.raises(AlreadyRunning, match=r"database .*main\.sqlite"):
        restore(archive, tmp_path / "elsewhere", force=force)
    assert database.stat().st_ino == inode
    # Nor does a second relay serve it, which a copied configuration would make.
    with exclusive(settings.directory_path, database), pytest.raises(AlreadyRunning):
        trio.run(serve, msgspec.structs.replace(settings, directory=str(tmp_path / "elsewhere")))


def test_places_named_in_the_configuration_are_obeyed(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path
) -> None:
    configuration = relay_directory / "relay.yaml"
    configuration.write_text("directory: data\ndatabase: {file: db/main.sqlite}\n")
    archive = tmp_path / "backup.tgz"
    back_up(relay_settings, configuration, archive)
    restore(archive, tmp_path / "new", force=False)
    assert (tmp_path / "new" / "data" / "db" / "main.sqlite").is_file()
    assert (tmp_path / "new" / "data" / "keys" / "root.pem").is_file()
    assert load_settings(tmp_path / "new" / "relay.yaml").directory_path == tmp_path / "new" / "data"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_restores_belongs_to_the_user_of_the_relay(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path
) -> None:
    archive, place = tmp_path / "backup.tar.gz", tmp_path / "restored"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    place.mkdir()
    os.chown(place, 12345, 23456)
    restore(archive, place, force=False)
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in place.rglob("*")}
    assert owners == {(12345, 23456)}
    assert {path.name for path in place.iterdir()} >= {"relay.yaml", "relay.sqlite", "relay.lock", "keys", "tls"}


def test_a_backup_never_replaces_a_file(relay_settings: Settings, relay_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(BackupRefused, match="exists already"):
        back_up(relay_settings, relay_directory / "relay.yaml", tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "x"


def test_what_is_backed_up_and_restored_outlives_a_power_failure(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of all files are durable, those of the rest before the database, without which there is no relay."""
    steps: list[tuple[str, Path]] = []
    rename = Path.rename

    def renaming(path: Path, to: Path) -> Path:
        steps.append(("name", to))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", renaming)
    for module in ("backup", "replacement"):
        monkeypatch.setattr(f"relay.{module}.sync_names", lambda folder: steps.append(("sync", folder)))
    configuration, archive = relay_directory / "relay.yaml", tmp_path / "backup.tgz"
    configuration.write_text("directory: data\ndatabase: {file: db/main.sqlite}\n")
    back_up(relay_settings, configuration, archive)
    assert steps == [("sync", tmp_path)]
    target = tmp_path / "new"
    restore(archive, target, force=False)
    steps.clear()
    aside = restore(archive, target, force=True)
    assert aside is not None
    database = target / "data" / "db" / "main.sqlite"
    last = steps.index(("name", database))
    assert ("sync", database.parent) in steps[last:]
    named = [(at, to) for at, (step, to) in enumerate(steps) if step == "name"]
    assert [to for at, to in named if at > last] == []
    for at, to in named[:-1]:
        assert ("sync", to.parent) in steps[at:last], to
    assert named[0][1].parent == database.parent
    assert named[0][1] != database
    assert named[1][1] == aside / "main.sqlite"
    assert steps.index(("sync", aside)) < steps.index(("name", target / "data" / "keys"))
    # Folders of the archive have their files' names before they have their own.
    unpacked = [folder.name for step, folder in steps[: named[0][0]] if step == "sync"]
    assert {"keys", "tls"} <= set(unpacked)


def two_disks(monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
    """What is below a folder is on another file system than all else."""
    rename = Path.rename

    def renaming(path: Path, to: Path) -> Path:
        if path.is_relative_to(disk) != to.is_relative_to(disk):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", renaming)


def backed_up_from(disk: Path, settings: Settings, directory: Path, folder: Path) -> Path:
    """An archive of a relay whose database lies on a disk of its own."""
    configuration, archive = directory / "relay.yaml", folder / "backup.tgz"
    configuration.write_text(f"directory: .\ndatabase: {{file: {disk / 'main.sqlite'}}}\n")
    back_up(settings, configuration, archive)
    return archive


def test_a_database_on_another_disk_is_restored_and_the_old_one_kept(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    archive = backed_up_from(disk, relay_settings, relay_directory, tmp_path)
    two_disks(monkeypatch, disk)
    target = tmp_path / "new"
    assert restore(archive, target, force=False) is None
    first = (disk / "main.sqlite").read_bytes()
    (disk / "main.sqlite-wal").write_bytes(b"log")
    aside = restore(archive, target, force=True)
    assert aside is not None
    assert (aside / "main.sqlite").read_bytes() == first == (disk / "main.sqlite").read_bytes()
    assert (aside / "main.sqlite-wal").read_bytes() == b"log"
    assert {path.stat().st_mode & 0o077 for path in aside.rglob("*")} == {0}
    assert {path.name for path in disk.iterdir()} <= {"main.sqlite", "main.sqlite.lock"}


def test_a_disk_that_does_not_hold_the_database_fails_before_anything_is_replaced(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    archive = backed_up_from(disk, relay_settings, relay_directory, tmp_path)
    target = tmp_path / "new"
    restore(archive, target, force=False)
    two_disks(monkeypatch, disk)

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for place in (target, disk) for path in place.rglob("*") if path.is_file()}

    before = contents()
    copy = shutil.copyfileobj

    def full(source: Any, written: Any, *more: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{written.fileno()}")).is_relative_to(disk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(source, written, *more)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        restore(archive, target, force=True)
    assert contents() == before


def archive_with(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo("keys")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
    return path


@pytest.mark.parametrize(
    "members",
    [
        {},
        {"relay.yaml": b""},
        {"relay.yaml": b"", "relay.sqlite": b"not a database" * 100},
        {"relay.yaml": b"nonsense: 1"},
        {"relay.yaml": b"", "../escape": b"x"},
        {"relay.yaml": b"", "keys/../../escape": b"x"},
        {"relay.yaml": b"", "/escape": b"x"},
        {"relay.yaml": b"", "other": b"x"},
    ],
)
def test_what_is_no_backup_is_refused_and_leaves_nothing(tmp_path: Path, members: dict[str, bytes]) -> None:
    archive = archive_with(tmp_path / "hostile.tgz", members)
    with pytest.raises(NeedsPerson):
        restore(archive, tmp_path / "inner" / "target", force=False)
    left = {path.name for path in (tmp_path / "inner").rglob("*") if path.is_file()} if members else set()
    assert left <= {"relay.lock"}
    assert not (tmp_path / "escape").exists()


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    archive = archive_with(tmp_path / "hostile.tgz", {"relay.yaml": b""}, link="/etc")
    with pytest.raises(BackupRefused):
        restore(archive, tmp_path / "target", force=False)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tgz").write_bytes(b"x" * 1000)
    with pytest.raises(BackupRefused, match="cannot be read as a backup"):
        restore(tmp_path / "x.tgz", tmp_path / "target", force=False)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_backup_that_is_cut_short_is_told_as_that_and_leaves_nothing(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, kept: float
) -> None:
    archive = tmp_path / "backup.tgz"
    size = back_up(relay_settings, relay_directory / "relay.yaml", archive)
    os.truncate(archive, int(size * kept))
    with pytest.raises(BackupRefused, match="is cut short"):
        restore(archive, tmp_path / "target", force=False)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_damaged_backup_is_never_put_in_place(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, place: float
) -> None:
    archive = tmp_path / "backup.tgz"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    content = bytearray(archive.read_bytes())
    content[int(len(content) * place)] ^= 1
    archive.write_bytes(content)
    with pytest.raises(BackupRefused, match=r"cannot be read as a backup|is cut short"):
        restore(archive, tmp_path / "target", force=False)
    assert not (tmp_path / "target").exists()


def test_restoring_needs_nothing_that_came_after_python_3_11_0(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12 has Python 3.11.2, whose tarfile knows no filters."""

    def extract(
        self: object, member: object, path: str = "", set_attrs: bool = True, *, numeric_owner: bool = False
    ) -> None:
        raise AssertionError("not with names that nobody has checked")

    monkeypatch.setattr(tarfile.TarFile, "extract", extract)
    archive = tmp_path / "backup.tgz"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    restore(archive, tmp_path / "target", force=False)
    assert (tmp_path / "target" / "keys" / "root.pem").read_bytes() == (relay_directory / "keys/root.pem").read_bytes()


def test_a_backup_into_a_folder_that_is_not_there_names_the_folder(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackupRefused, match=f"no folder {tmp_path}/missing to write backup.tgz in; make it first"):
        back_up(relay_settings, relay_directory / "relay.yaml", tmp_path / "missing" / "backup.tgz")


def test_a_log_that_another_command_leaves_meanwhile_is_not_taken_for_that_of_the_restored_database(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path
) -> None:
    archive, log = tmp_path / "backup.tgz", relay_directory / "relay.sqlite-wal"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    log.unlink()
    aside = restore(archive, relay_directory, force=True, note=lambda _database: log.touch())
    assert aside is not None
    assert (aside / log.name).exists()
    assert not log.exists()


def test_a_relay_that_is_made_while_a_backup_is_unpacked_is_not_replaced(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path
) -> None:
    archive, place = tmp_path / "backup.tgz", tmp_path / "restored"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    with pytest.raises(BackupRefused, match="--force"):
        restore(archive, place, force=False, note=lambda _database: (place / "relay.yaml").touch())
    assert {path.name for path in place.iterdir()} == {"relay.yaml", "relay.lock"}


def test_symlinks_that_lead_nowhere_are_moved_aside(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path
) -> None:
    """Their disk may be mounted again."""
    archive, place = tmp_path / "backup.tgz", tmp_path / "restored"
    back_up(relay_settings, relay_directory / "relay.yaml", archive)
    place.mkdir()
    for name in ("keys", "relay.yaml"):
        (place / name).symlink_to(tmp_path / "nowhere" / name)
    with pytest.raises(BackupRefused, match=r"\(relay\.yaml, keys\)"):
        restore(archive, place, force=False)
    aside = restore(archive, place, force=True)
    assert aside is not None
    assert {path.name for path in aside.iterdir() if path.is_symlink()} == {"keys", "relay.yaml"}
    assert (place / "keys" / "root.pem").is_file()


def test_no_backup_is_made_of_two_relays(
    relay_settings: Settings, relay_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first.tgz", tmp_path / "second.tgz"
    back_up(relay_settings, relay_directory / "relay.yaml", first)
    copy = backup._copy_database

    def copy_and_restore(source: Path, target: Path) -> None:
        copy(source, target)
        restore(first, relay_directory, force=True)

    monkeypatch.setattr(backup, "_copy_database", copy_and_restore)
    with pytest.raises(BackupRefused, match="meanwhile"):
        back_up(relay_settings, relay_directory / "relay.yaml", second)
    assert {path.name for path in tmp_path.glob("*.tgz")} == {"first.tgz"}

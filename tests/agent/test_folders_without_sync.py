"""File systems that cannot sync a folder alone (shared folders of virtual machines, some file servers): they say so,
and everything works all the same."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import trio

from agent.state_files import make_folder
from agent.storage import handles, libc
from agent.storage.posix import open_root
from protocol.private_file import write_private_file
from tests.agent.engine_inside import Engine, contents, quick_path

__all__ = ["quick_path"]


@pytest.fixture(params=[errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def without_sync(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Folders cannot be synced; what is synced as a whole instead."""
    real, whole = os.fsync, []

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(request.param, "not here")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "sync", lambda: whole.append(-1))
    monkeypatch.setattr(libc, "syncfs", whole.append)
    return whole


async def test_a_transfer_onto_such_a_file_system(quick_path: Path, without_sync: list[int]) -> None:
    engine = Engine(quick_path)
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "small").write_bytes(b"small")
    (engine.source / "large").write_bytes(os.urandom(3_000_000))
    with trio.fail_after(20):
        observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert without_sync


def test_the_agents_own_state_on_such_a_file_system(tmp_path: Path, without_sync: list[int]) -> None:
    make_folder(tmp_path / "state")
    write_private_file(tmp_path / "state" / "key", b"secret")
    assert (tmp_path / "state" / "key").read_bytes() == b"secret"
    assert len(without_sync) == 2


def test_a_fault_of_the_disk_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fsync)
    with open_root(str(tmp_path)) as root, root.open_directory(()) as top, pytest.raises(OSError, match="broken"):
        top.sync()
    with pytest.raises(OSError, match="broken"):
        make_folder(tmp_path / "state")


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOTTY])
def test_macos_syncs_otherwise_where_the_drives_cache_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """File servers and FAT refuse F_FULLFSYNC."""
    import fcntl

    def refuse(_fd: int, _command: int) -> int:
        raise OSError(code, "not here")

    synced: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    handles.sync_handle(7)
    assert synced == [7]

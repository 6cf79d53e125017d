"""Another file system mounted below a collection's root: what is written there is made durable there."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from agent.storage import handles, libc, mounts, page_cache, posix
from agent.storage.posix import open_root
from agent.storage.reach import Reach
from agent.transfer.settling.batch import SYNCFS_FROM
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path
from tests.agent.small_disks import memory_disk, needs_root

__all__ = ["quick_path"]
pytestmark = needs_root


class Synced:
    """By device: how often it was synced as a whole, and how many regular files on it were synced alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disks: Counter[int] = Counter()
        self.files: Counter[int] = Counter()
        syncfs, sync_handle = libc.syncfs, handles.sync_handle

        def whole(fd: int) -> None:
            self.disks[os.fstat(fd).st_dev] += 1
            syncfs(fd)

        def one(fd: int) -> None:
            if handles.stat_bits.S_ISREG(os.fstat(fd).st_mode):
                self.files[os.fstat(fd).st_dev] += 1
            sync_handle(fd)

        monkeypatch.setattr(libc, "syncfs", whole)
        monkeypatch.setattr(handles, "sync_handle", one)


@pytest.mark.parametrize("local", [True, False])
async def test_files_on_a_disk_below_the_root_are_synced_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    engine = Engine(tmp_path, options=CHECKED)
    for folder in ("here", "below"):
        (engine.source / folder).mkdir()
        for number in range(SYNCFS_FROM + 8):
            (engine.source / folder / str(number)).write_bytes(b"content" * number)
    with memory_disk(engine.destination / "below", 4):
        below = (engine.destination / "below").stat().st_dev
        here = engine.destination.stat().st_dev
        if not local:
            kind_of = mounts.mount_of

            def served(fd: int, path: str) -> mounts.Mount:
                mount = kind_of(fd, path)
                return mounts.Mount("nfs4", mount.mount_point) if os.fstat(fd).st_dev == below else mount

            monkeypatch.setattr(mounts, "mount_of", served)
        synced = Synced(monkeypatch)
        assert (await engine.run()).state == "SUCCEEDED"
        assert contents(engine.destination) == contents(engine.source)
        # All on each disk, by one call for many or by one each.
        assert synced.disks[here] or synced.files[here] == SYNCFS_FROM + 8
        assert synced.disks[below] or synced.files[below] == SYNCFS_FROM + 8
        assert local or not synced.disks[below]


def test_a_folder_says_on_which_disk_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "below").mkdir()
    with memory_disk(tmp_path / "below", 1), open_root(str(tmp_path)) as root, root.open_directory(()) as top:
        with top.open_directory(b"folder") as folder, top.open_directory(b"below") as below:
            assert folder.disk() == top.disk() == tmp_path.stat().st_dev
            assert below.disk() == (tmp_path / "below").stat().st_dev
            below.sync_disk()
            monkeypatch.setattr(posix.mounts, "is_local", lambda _: False)
            # It was looked at before.
            assert below.disk() is not None
        with open_root(str(tmp_path)) as served, served.open_directory(()) as folder:
            assert folder.disk() is None
            with pytest.raises(OSError, match="not supported"):
                folder.sync_disk()


def test_a_disk_is_synced_by_one_handle_for_as_long_as_its_root_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells a handle of write errors since it was opened: a new one would not hear of what somebody else's
    sync, of another task on the same disk, was told of meanwhile."""
    asked: list[int] = []
    monkeypatch.setattr(libc, "syncfs", asked.append)
    places = [tmp_path / "here", tmp_path / "below"]
    places[0].mkdir()
    with memory_disk(places[1], 1):
        for place in places:
            (place / "one").mkdir()
            (place / "two").mkdir()
        with open_root(str(tmp_path)) as whole:
            root = whole.narrowed(Reach(((),)))
        with root:
            for place in places:
                for name in ("one", "two"):
                    with root.open_directory((os.fsencode(place.name), os.fsencode(name))) as folder:
                        folder.sync_disk()
                assert os.fstat(asked[-1]).st_dev == place.stat().st_dev
            here, below = asked[0], asked[2]
            assert asked == [here, here, below, below]
            assert here == root._fd
        for handle in (here, below):
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(handle)


@pytest.mark.parametrize("processes", [0, 1])
async def test_files_on_a_disk_below_a_root_in_memory_are_read_back_past_the_cache(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    forgotten: set[int] = set()
    monkeypatch.setattr(page_cache, "forget", lambda fd, *_: forgotten.add(os.fstat(fd).st_dev))
    engine = Engine(quick_path, options=CHECKED, processes=processes)
    for name in ("here", "below/there"):
        (engine.source / name).parent.mkdir(exist_ok=True)
        (engine.source / name).write_bytes(b"content")
    # Any other device; that this one is in memory, too, nobody asks.
    with memory_disk(engine.destination / "below", 1):
        assert (await engine.run()).state == "SUCCEEDED"
        assert forgotten == {(engine.destination / "below").stat().st_dev}

"""What only real file systems have: special files, hard links, permissions, mounts."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.storage import libc, mounts
from agent.storage.base import Directory, NotRegularFile
from agent.storage.posix import PosixRoot, open_root
from agent.storage.unavailable import CollectionUnavailable
from protocol.errors import NeedsPerson

PROJECT = Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture()
def root(tmp_path: Path) -> Iterator[PosixRoot]:
    (tmp_path / "root").mkdir()
    with open_root(str(tmp_path / "root")) as made:
        yield made


@pytest.fixture()
def top(root: PosixRoot) -> Iterator[Directory]:
    with root.open_directory(()) as directory:
        yield directory


# --- special files ---------------------------------------------------------------------------------------


def special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)
    else:
        try:
            os.mknod(path, 0o600 | (stat.S_IFCHR if kind == "chr" else stat.S_IFBLK), os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making device nodes needs privileges")


@pytest.mark.parametrize("kind", ["pipe", "socket", "chr", "blk"])
def test_special_files_never_block_and_are_never_opened(
    root: PosixRoot, top: Directory, tmp_path: Path, kind: str
) -> None:
    special(tmp_path / "root" / "s", kind)
    os.symlink("s", tmp_path / "root" / "l")
    started = time.monotonic()
    expected = "other" if kind == "socket" else kind
    assert {node.name: node.kind for node in top.scan()} == {b"s": expected, b"l": "symlink"}
    assert top.stat(b"l").kind == expected
    calls: list[Callable[[], object]] = [
        lambda: top.open_read(b"s"),
        lambda: top.open_read(b"l", follow=True),
        lambda: top.open_temporary(b"s"),
        lambda: top.set_mode(b"s", 0o777),
    ]
    for call in calls:
        with pytest.raises(NotRegularFile):
            call()
    with pytest.raises(NotADirectoryError):
        root.open_directory((b"s", b"x"))
    with pytest.raises(NotADirectoryError):
        top.open_directory(b"s")
    with pytest.raises(FileExistsError):
        top.create_temporary(b"s")
    assert stat.S_IMODE(os.lstat(tmp_path / "root" / "s").st_mode) != 0o777
    # The name itself may be replaced: the special file goes, nothing is written into it.
    root.close_file(top.create_temporary(b".towpath.t"))
    top.rename(b".towpath.t", b"s")
    assert top.lstat(b"s").kind == "file"
    assert time.monotonic() - started < 5


def test_replacing_a_hard_link_leaves_the_other_name_alone(root: PosixRoot, top: Directory, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    os.link(outside, tmp_path / "root" / "f")
    os.link(outside, tmp_path / "root" / ".towpath.t")
    before = os.stat(outside)
    with pytest.raises(NotRegularFile):
        top.open_temporary(b".towpath.t")
    with pytest.raises(FileExistsError):
        top.create_temporary(b".towpath.t")
    top.unlink(b".towpath.t")
    fd = top.create_temporary(b".towpath.t")
    root.pwrite(fd, b"new", 0)
    root.close_file(fd)
    top.rename(b".towpath.t", b"f")
    assert outside.read_bytes() == b"precious"
    after = os.stat(outside)
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert after.st_nlink == 1
    assert (tmp_path / "root" / "f").read_bytes() == b"new"


def test_times_of_access_do_not_become_old(root: PosixRoot, top: Directory, tmp_path: Path) -> None:
    """Scratch file systems purge what was not accessed for long; a file that has just arrived must not look like it."""
    root.close_file(top.create_temporary(b"f"))
    top.set_times(b"f", 1)
    status = os.stat(tmp_path / "root" / "f")
    assert status.st_mtime_ns == 1
    assert time.time() - status.st_atime < 60


def test_rename_without_replacing_where_the_kernel_cannot(
    root: PosixRoot, top: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(libc, "rename_no_replace", refuse)
    for name in (b"f", b"g"):
        root.close_file(top.create_temporary(name))
    top.mkdir(b"d")
    for name in (b"f", b"d"):
        with pytest.raises(FileExistsError):
            top.rename_no_replace(name, b"g")
        top.rename_no_replace(name, name + b"2")
    assert sorted(node.name for node in top.scan()) == [b"d2", b"f2", b"g"]

    def no_links(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "FAT has no links")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileExistsError):
        top.rename_no_replace(b"f2", b"g")
    top.rename_no_replace(b"f2", b"f3")
    assert sorted(node.name for node in top.scan()) == [b"d2", b"f3", b"g"]


# --- permissions -----------------------------------------------------------------------------------------


def as_nobody(folder: Path, body: str) -> dict[str, object]:
    """Run statements in a process that opens the root and then drops its privileges; what they put into ``seen``."""
    if os.geteuid() != 0:
        pytest.skip("dropping privileges needs root; without it the other tests run unprivileged anyway")
    script = textwrap.dedent(
        """
        import errno, json, os, sys
        sys.path.insert(0, sys.argv[1])
        from agent.storage.base import NotRegularFile
        from agent.storage.posix import open_root
        from agent.storage.faults import fault
        root = open_root(sys.argv[2])
        os.setgroups([])
        os.setgid(int(sys.argv[3]))
        os.setuid(int(sys.argv[3]))
        seen = {}
        def outcome(call):
            try:
                call()
                return "done"
            except OSError as error:
                return fault(error, "destination", ()).code
        """
    )
    script += textwrap.dedent(body) + "\nprint(json.dumps(seen))\n"
    done = subprocess.run(
        [sys.executable, "-c", script, str(PROJECT), str(folder), str(NOBODY)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def test_what_an_ordinary_user_may_not(root: PosixRoot, tmp_path: Path) -> None:
    inside = tmp_path / "root"
    (inside / "mine").mkdir()
    os.chown(inside / "mine", NOBODY, NOBODY)
    (inside / "closed").mkdir(mode=0o700)
    (inside / "closed" / "f").write_bytes(b"x")
    (inside / "passage" / "open").mkdir(parents=True)
    (inside / "passage" / "open" / "f").write_bytes(b"x")
    (inside / "passage").chmod(0o711)
    (inside / "dropbox").mkdir()
    (inside / "dropbox").chmod(0o733)
    (inside / "secret").write_bytes(b"x")
    (inside / "secret").chmod(0o600)
    inside.chmod(0o755)
    seen = as_nobody(
        inside,
        """
        with root.open_directory(()) as top:
            seen["read"] = outcome(lambda: top.open_read(b"secret"))
            seen["create"] = outcome(lambda: top.create_temporary(b"x"))
            seen["mode"] = outcome(lambda: top.set_mode(b"secret", 0o644))
            seen["times"] = outcome(lambda: top.set_times(b"secret", 0))
            seen["unlink"] = outcome(lambda: top.unlink(b"secret"))
            seen["names"] = sorted(node.name.decode() for node in top.scan())
        seen["closed"] = outcome(lambda: root.open_directory((b"closed",)).open_read(b"f"))
        seen["closed_scan"] = outcome(lambda: list(root.open_directory((b"closed",)).scan()))
        seen["passage"] = root.stat((b"passage", b"open", b"f")).size
        seen["passage_scan"] = outcome(lambda: list(root.open_directory((b"passage",)).scan()))
        with root.open_directory((b"dropbox",)) as box:
            fd = box.create_temporary(b".towpath.t")
            root.close_file(fd)
            box.rename(b".towpath.t", b"given")
            box.sync()
            seen["dropbox"] = box.lstat(b"given").size
            seen["dropbox_scan"] = outcome(lambda: list(box.scan()))
        seen["made"] = outcome(lambda: root.make_directories((b"new",)))
        root.make_directories((b"mine", b"a", b"b")).close()
        """,
    )
    assert seen == {
        "read": "PERMISSION_DENIED",
        "create": "PERMISSION_DENIED",
        "mode": "PERMISSION_DENIED",
        "times": "PERMISSION_DENIED",
        "unlink": "PERMISSION_DENIED",
        "names": ["closed", "dropbox", "mine", "passage", "secret"],
        "closed": "PERMISSION_DENIED",
        "closed_scan": "PERMISSION_DENIED",
        "passage": 1,
        "passage_scan": "PERMISSION_DENIED",
        "dropbox": 0,
        "dropbox_scan": "PERMISSION_DENIED",
        "made": "PERMISSION_DENIED",
    }
    assert (inside / "mine" / "a" / "b").is_dir()


def test_a_planted_temporary_of_somebody_else_is_not_resumed(root: PosixRoot, tmp_path: Path) -> None:
    inside = tmp_path / "root"
    os.chmod(inside, 0o777)
    (inside / ".towpath.planted").write_bytes(b"evil")
    (inside / ".towpath.planted").chmod(0o666)
    seen = as_nobody(
        inside,
        """
        with root.open_directory(()) as top:
            seen["planted"] = outcome(lambda: top.open_temporary(b".towpath.planted"))
            root.close_file(top.create_temporary(b".towpath.own", 0o400))
            fd = top.open_temporary(b".towpath.own")
            root.fsync(fd)
            seen["own"] = outcome(lambda: root.pwrite(fd, b"x", 0)) != "done"
            root.close_file(fd)
        """,
    )
    assert seen == {"planted": "NOT_A_FILE", "own": True}


# --- the root --------------------------------------------------------------------------------------------


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("nothing", "file"):
        with pytest.raises(NeedsPerson) as caught:
            open_root(str(tmp_path / name))
        assert caught.value.code == "COLLECTION_UNAVAILABLE"
        assert isinstance(caught.value, CollectionUnavailable)
        assert name in caught.value.owners
        assert str(tmp_path) not in str(caught.value.to_document()), "others are told of no place on this machine"


def test_a_root_that_went_away_or_changed(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with open_root(str(place)) as root:
        root.check_present()
        place.rename(tmp_path / "moved")
        with pytest.raises(NeedsPerson):
            root.check_present()
        place.mkdir()
        with pytest.raises(NeedsPerson) as caught:
            root.check_present()
        assert caught.value.code == "COLLECTION_UNAVAILABLE"
        place.rmdir()
        (tmp_path / "moved").rename(place)
        root.check_present()


def test_the_mark_knows_another_folder(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with open_root(str(tmp_path / "one")) as root:
        mark = root.mark()
        assert (mark.marker, root.place_marker()) == ("", root.mark())
        mark = root.place_marker()
    with open_root(str(tmp_path / "one"), mark) as root:
        root.check_original()
    if not mark.inode:
        pytest.skip("this file system's inode numbers do not last")
    before = len(os.listdir("/proc/self/fd"))
    # Another folder on the same disk may be used, but nothing is deleted there for a mirror's sake.
    with open_root(str(tmp_path / "two"), mark) as root, pytest.raises(NeedsPerson) as caught:
        root.check_original()
    assert caught.value.code == "ROOT_CHANGED"
    with pytest.raises(CollectionUnavailable, match="not on the disk that it was on when it was set up") as changed:
        open_root(str(tmp_path / "two"), dataclasses.replace(mark, mount_point="/elsewhere"))
    assert "/elsewhere" in changed.value.owners
    assert "/elsewhere" not in str(changed.value.to_document())
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_marker_knows_another_disk_with_the_same_inode(tmp_path: Path) -> None:
    with open_root(str(tmp_path)) as root:
        mark = root.place_marker()
    if not mark.marker:
        pytest.skip("this file system keeps no extended attributes")
    os.setxattr(tmp_path, "user.towpath.root", b"another disk")
    with open_root(str(tmp_path), mark) as root, pytest.raises(NeedsPerson) as caught:
        root.check_original()
    assert caught.value.code == "ROOT_CHANGED"
    # What an earlier version kept has no marker, and none is asked for.
    with open_root(str(tmp_path), dataclasses.replace(mark, marker="")) as root:
        root.check_original()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_another_volume_without_attributes_is_known_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT, by the kernel's interface; there need be no such file system here."""
    number = 0x12340001

    def ioctl(_fd: int, command: int, argument: bytes) -> bytes:
        # FAT_IOCTL_GET_VOLUME_ID: _IOR('r', 0x13, __u32)
        assert (command, len(argument)) == (2 << 30 | 4 << 16 | ord("r") << 8 | 0x13, 4)
        return number.to_bytes(4, sys.byteorder)

    def no_attributes(*_: object) -> bytes:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with open_root(str(tmp_path)) as root:
        # Elsewhere the call means nothing.
        assert mounts._volume(root._fd) == ""
    monkeypatch.setattr(os, "getxattr", no_attributes)
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    with open_root(str(tmp_path)) as root:
        mark = root.place_marker()
    assert mark.marker == "volume 1234-0001"
    with open_root(str(tmp_path), mark) as root:
        root.check_original()
    number = 0x12340002
    with pytest.raises(NeedsPerson, match="volume it was on when it was set up, with the number 1234-0001"):
        open_root(str(tmp_path), mark)
    number = 0
    with open_root(str(tmp_path)) as root:
        assert root.mark().marker == ""


def test_an_unmounted_disk_is_not_an_empty_folder(tmp_path: Path) -> None:
    """With a real mount in a mount namespace of its own, where the system allows that."""
    place = tmp_path / "disk"
    place.mkdir()
    script = textwrap.dedent(
        """
        import subprocess, sys
        sys.path.insert(0, sys.argv[1])
        from agent.storage.posix import open_root
        from protocol.errors import NeedsPerson
        place = sys.argv[2]
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
        root = open_root(place)
        mark = root.mark()
        print(root.features.file_system, root.features.local, mark.mount_point == place)
        root.check_present()
        subprocess.run(["umount", "--lazy", place], check=True)
        for attempt in (root.check_present, lambda: open_root(place, mark)):
            try:
                attempt()
                print("taken for an empty folder")
            except NeedsPerson as error:
                print(error.code)
        """
    )
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", script, str(PROJECT), str(place)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0 and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no mount namespace here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["tmpfs True True", "COLLECTION_UNAVAILABLE", "COLLECTION_UNAVAILABLE"]


def test_mount_points_with_spaces() -> None:
    line = rb"36 35 98:0 /mnt1 /mnt/my\040disk\011x rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
    assert mounts.parse_mount(line) == mounts.Mount("ext3", "/mnt/my disk\tx")


def test_differences_of_marks() -> None:
    mark = mounts.mark_of(mounts.Mount("ext4", "/data"), 7)
    assert mounts.difference(mark, mark) == ""
    assert "/data" in mounts.difference(mark, mounts.mark_of(mounts.Mount("ext4", "/"), 7))
    assert "tmpfs" in mounts.difference(mark, mounts.mark_of(mounts.Mount("tmpfs", "/data"), 7))
    assert mounts.difference(mark, mounts.mark_of(mounts.Mount("ext4", "/data"), 8))
    sshfs = mounts.Mount("fuse.sshfs", "/data")
    assert mounts.mark_of(sshfs, 7) == mounts.mark_of(sshfs, 8)
    assert not mounts.is_local("nfs4")
    assert not mounts.is_local("")


def test_a_root_spelled_through_a_link(tmp_path: Path) -> None:
    """Absolute links are inside whichever way they spell the root."""
    (tmp_path / "real" / "a").mkdir(parents=True)
    os.symlink(tmp_path / "real", tmp_path / "alias")
    os.symlink(tmp_path / "real" / "a", tmp_path / "real" / "by_real")
    os.symlink(tmp_path / "alias" / "a", tmp_path / "real" / "by_alias")
    with open_root(str(tmp_path / "alias")) as root:
        for name in (b"by_real", b"by_alias"):
            with root.open_directory((name,)) as directory:
                assert directory.path == (b"a",)


def test_the_whole_machine_as_root() -> None:
    with open_root("/") as root:
        node = root.stat(tuple(os.fsencode(part) for part in Path(sys.executable).resolve().parts[1:]))
        assert node.inode == os.stat(sys.executable).st_ino


def test_a_closed_root_walks_nowhere(tmp_path: Path) -> None:
    root = open_root(str(tmp_path))
    root.close()
    root.close()
    with pytest.raises(OSError) as caught:
        root.open_directory(())
    assert caught.value.errno == errno.EBADF

"""What every storage must do. A new implementation starts by passing this and `test_storage_symlinks`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agent.storage.attributes import Found
from agent.storage.base import Directory, IllegalName, NotRegularFile, Root
from agent.storage.hiding import HidingRoot
from agent.storage.node import node_from_stat, version_of
from agent.storage.posix import open_root
from tests.agent.storage_cases import OLD, code, content, names, read, root, top, write

__all__ = ["root", "top"]


# --- nodes -----------------------------------------------------------------------------------------------


def test_nodes_of_each_kind(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"hello")
    top.mkdir(b"d")
    top.symlink(b"l", b"f")
    kinds = {node.name: (node.kind, node.nlink >= 1) for node in top.scan()}
    assert kinds == {b"f": ("file", True), b"d": ("dir", True), b"l": ("symlink", True)}
    node = top.lstat(b"f")
    assert (node.size, node.mode, node.uid) == (5, 0o600, os.geteuid())
    assert top.lstat(b"l").size == 1
    assert top.lstat(b"l").kind == "symlink"
    assert top.stat(b"l").kind == "file"
    assert top.stat(b"l").name == b"l"
    assert root.stat((b"l",)).inode == node.inode
    assert top.stat(b"f") == node
    assert top.lstat(b"f") in list(top.scan())


def test_version_changes_with_the_content(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"one")
    before = top.lstat(b"f")
    fd, status = top.open_read_status(b"f")
    assert version_of(status) == before.version == version_of(root.fstat(fd))
    root.close_file(fd)
    again = top.open_temporary(b"f")
    root.ftruncate(again, 2)
    root.close_file(again)
    assert top.lstat(b"f").version != before.version
    write(root, top, b"g", b"one")
    top.rename(b"g", b"f")
    assert top.lstat(b"f").inode != before.inode


def test_status_of_an_open_folder(root: Root, top: Directory) -> None:
    assert top.status().kind == "dir"
    assert top.status().name == b""
    assert (top.status().device, top.status().inode) == root.identity()
    with root.make_directories((b"a", b"b")) as directory:
        assert directory.status().name == b"b"
        assert directory.status().inode == root.stat((b"a", b"b")).inode


# --- scanning --------------------------------------------------------------------------------------------


def test_scan_hides_temporaries(root: Root, top: Directory) -> None:
    if isinstance(root, HidingRoot):
        pytest.skip("hidden names do not exist there; test_storage_hiding tests it")
    write(root, top, b".towpath.1")
    write(root, top, b".hidden")
    assert names(top) == [b".hidden"]
    assert sorted(node.name for node in top.scan(reserved=True)) == [b".hidden", b".towpath.1"]


def test_overlapping_scans_each_see_everything(root: Root, top: Directory) -> None:
    expected = sorted(b"%03d" % number for number in range(300))
    for name in expected:
        top.mkdir(name)
    first = top.scan()
    started = [next(first).name for _ in range(10)]
    assert names(top) == expected
    assert sorted(started + [node.name for node in first]) == expected


def test_names_are_bytes(root: Root, top: Directory) -> None:
    odd = [
        b"\xff\xfe",
        b"a\nb",
        b" ",
        b"~",
        b"COM1",
        b"x.",
        "é".encode(),
        b"a\\b",
        b"c:",
        b"\x1b[0m",
        b"-rf",
        b"x" * 255,
    ]
    for name in odd:
        write(root, top, name, name)
    assert names(top) == sorted(odd)
    for name in odd:
        assert content(root, top, name) == name
        assert root.stat((name,)).name == name


def test_names_that_no_system_takes(root: Root, top: Directory) -> None:
    for name in (b"", b".", b"..", b"a/b", b"/", b"../x", b"a\0b"):
        for operation in (
            lambda name: top.lstat(name),
            lambda name: top.stat(name),
            lambda name: top.open_read(name),
            lambda name: top.open_directory(name),
            lambda name: top.create_temporary(name),
            lambda name: top.open_temporary(name),
            lambda name: top.rename(name, b"x"),
            lambda name: top.mkdir(name),
            lambda name: top.unlink(name),
            lambda name: top.rmdir(name),
            lambda name: top.symlink(name, b"x"),
            lambda name: top.readlink(name),
            lambda name: top.set_times(name, 0),
            lambda name: top.set_mode(name, 0o600),
            lambda name: root.open_directory((name,)),
            lambda name: root.open_directory((name, b"x")),
            lambda name: root.open_parent((b"x", name)),
            lambda name: root.open_parent((name, b"x")),
            lambda name: root.stat((name,)),
            lambda name: root.make_directories((name,)),
        ):
            with pytest.raises(IllegalName):
                operation(name)
    write(root, top, b"f")
    for name in (b"", b"..", b"a/b", b"a\0b"):
        with pytest.raises(IllegalName):
            top.rename(b"f", name)
        with pytest.raises(IllegalName):
            top.rename_no_replace(b"f", name)
    assert code(lambda: top.mkdir(b"x" * 256)) == errno.ENAMETOOLONG
    with pytest.raises(IllegalName):
        root.open_parent(())


# --- files -----------------------------------------------------------------------------------------------


def test_a_file_from_temporary_to_name(root: Root, top: Directory) -> None:
    fd = top.create_temporary(b".towpath.t")
    assert root.pwrite(fd, b"world", 6) == 5
    assert root.pwrite(fd, memoryview(b"hello "), 0) == 6
    root.fchmod(fd, 0o4640)
    root.futimes(fd, OLD)
    root.fsync(fd)
    root.close_file(fd)
    top.rename(b".towpath.t", b"f")
    top.sync()
    assert names(top) == [b"f"]
    assert content(root, top, b"f") == b"hello world"
    node = top.lstat(b"f")
    assert (node.mode, node.mtime_ns) == (0o640, OLD)


def test_creating_never_opens_what_is_there(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"kept")
    top.symlink(b"l", b"f")
    top.symlink(b"dangling", b"nothing")
    for name in (b"f", b"l", b"dangling"):
        assert code(lambda name=name: top.create_temporary(name)) == errno.EEXIST
    assert content(root, top, b"f") == b"kept"
    assert names(top) == [b"dangling", b"f", b"l"]


def test_special_bits_are_not_taken_over(root: Root, top: Directory) -> None:
    root.close_file(top.create_temporary(b"f", 0o7700))
    assert top.lstat(b"f").mode == 0o700
    top.set_mode(b"f", 0o7640)
    assert top.lstat(b"f").mode == 0o640
    top.set_mode(b"f", 0o4700, special=True)
    assert top.lstat(b"f").mode == 0o4700
    top.mkdir(b"d", 0o7700)
    assert top.lstat(b"d").mode == 0o700
    top.set_mode(b"d", 0o2755)
    assert top.lstat(b"d").mode == 0o755


def test_resuming_a_temporary(root: Root, top: Directory) -> None:
    write(root, top, b".towpath.t", b"abc")
    fd = top.open_temporary(b".towpath.t")
    root.pwrite(fd, b"X", 1)
    root.close_file(fd)
    assert content(root, top, b".towpath.t") == b"aXc"
    assert code(lambda: top.open_temporary(b"nothing")) == errno.ENOENT
    top.mkdir(b"d")
    assert code(lambda: top.open_temporary(b"d")) == errno.EISDIR
    top.symlink(b"l", b".towpath.t")
    assert code(lambda: top.open_temporary(b"l")) == errno.ELOOP


def test_opening_for_reading(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"text")
    top.mkdir(b"d")
    top.symlink(b"l", b"f")
    top.symlink(b"to_d", b"d")
    assert code(lambda: top.open_read(b"nothing")) == errno.ENOENT
    assert code(lambda: top.open_read(b"d")) == errno.EISDIR
    assert code(lambda: top.open_read(b"l")) == errno.ELOOP
    assert code(lambda: top.open_read(b"to_d", follow=True)) == errno.EISDIR
    assert content(root, top, b"l", follow=True) == b"text"
    fd = top.open_read(b"f")
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"x", 0)
    assert caught.value.errno == errno.EBADF
    root.close_file(fd)


def test_reading_in_pieces(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"0123456789")
    fd = top.open_read(b"f")
    first, second = bytearray(3), bytearray(4)
    assert root.preadv(fd, [first, second], 2) == 7
    assert (bytes(first), bytes(second)) == (b"234", b"5678")
    assert root.preadv(fd, [first], 10) == 0
    root.close_file(fd)


def test_holes(root: Root, top: Directory) -> None:
    fd = top.create_temporary(b"f")
    root.ftruncate(fd, (1 << 53) + 1 if root.features.file_system != "ext4" else (1 << 43) + 1)
    root.pwrite(fd, b"end", 1 << 32)
    buffer = bytearray(4)
    assert root.preadv(fd, [buffer], (1 << 32) - 1) == 4
    assert bytes(buffer) == b"\0end"
    assert root.fstat(fd).st_blocks * 512 < 1 << 20
    root.close_file(fd)


# --- renaming --------------------------------------------------------------------------------------------


def test_renaming_over_what_is_there(root: Root, top: Directory) -> None:
    write(root, top, b"old", b"old")
    for kind in ("file", "symlink", "dangling"):
        write(root, top, b"new", b"new")
        if kind == "file":
            write(root, top, b"there")
        else:
            top.symlink(b"there", b"old" if kind == "symlink" else b"nothing")
        top.rename(b"new", b"there")
        assert content(root, top, b"there") == b"new"
        top.unlink(b"there")
    assert content(root, top, b"old") == b"old"
    assert names(top) == [b"old"]


def test_renaming_may_spare_symlinks(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"f")
    top.symlink(b"l", b"f")
    assert code(lambda: top.rename(b"f", b"l", replace_symlink=False)) == errno.EEXIST
    top.rename(b"f", b"g", replace_symlink=False)
    assert names(top) == [b"g", b"l"]


def test_a_folder_in_the_way(root: Root, top: Directory) -> None:
    write(root, top, b"f")
    top.mkdir(b"d")
    assert code(lambda: top.rename(b"f", b"d")) == errno.EISDIR
    assert code(lambda: top.rename(b"d", b"f")) == errno.ENOTDIR
    assert code(lambda: top.rename(b"nothing", b"x")) == errno.ENOENT
    with top.open_directory(b"d") as inner:
        inner.mkdir(b"e")
        assert code(lambda: top.rename(b"d", b"e", inner)) == errno.EINVAL
    top.mkdir(b"d2")
    assert code(lambda: top.rename(b"d2", b"d")) in (errno.ENOTEMPTY, errno.EEXIST)


def test_renaming_into_another_folder(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"moved")
    with root.make_directories((b"a", b"b")) as target:
        top.rename(b"f", b"g", target)
        assert names(top) == [b"a"]
        assert content(root, target, b"g") == b"moved"
        target.rename_no_replace(b"g", b"h", top)
        assert names(target) == []
    assert names(top) == [b"a", b"h"]


def test_renaming_without_replacing(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"f")
    write(root, top, b"g", b"g")
    top.mkdir(b"d")
    top.symlink(b"dangling", b"nothing")
    for name in (b"g", b"d", b"dangling", b"f"):
        assert code(lambda name=name: top.rename_no_replace(b"f", name)) == errno.EEXIST
    assert code(lambda: top.rename_no_replace(b"nothing", b"x")) == errno.ENOENT
    top.rename_no_replace(b"f", b"x")
    top.rename_no_replace(b"d", b"y")
    assert names(top) == [b"dangling", b"g", b"x", b"y"]
    assert content(root, top, b"g") == b"g"


def test_an_open_folder_survives_its_renaming(root: Root, top: Directory) -> None:
    with root.make_directories((b"a",)) as directory:
        top.rename(b"a", b"b")
        write(root, directory, b"f", b"here")
    assert root.stat((b"b", b"f")).size == 4


# --- folders and removal -----------------------------------------------------------------------------------


def test_making_folders(root: Root, top: Directory) -> None:
    top.mkdir(b"a")
    assert code(lambda: top.mkdir(b"a")) == errno.EEXIST
    with root.make_directories((b"a", b"b", b"c")) as directory:
        assert directory.path == (b"a", b"b", b"c")
        write(root, directory, b"f")
    with root.make_directories((b"a", b"b", b"c"), durable=False) as directory:
        assert names(directory) == [b"f"]
    with root.make_directories(()) as directory:
        assert names(directory) == [b"a"]
    assert code(lambda: root.make_directories((b"a", b"b", b"c", b"f"))) == errno.ENOTDIR
    assert code(lambda: root.make_directories((b"a", b"b", b"c", b"f", b"g"))) == errno.ENOTDIR


def test_removing(root: Root, top: Directory) -> None:
    write(root, top, b"f")
    top.mkdir(b"d")
    top.symlink(b"l", b"d")
    assert code(lambda: top.unlink(b"d")) in (errno.EISDIR, errno.EPERM)
    assert code(lambda: top.rmdir(b"f")) == errno.ENOTDIR
    assert code(lambda: top.rmdir(b"l")) == errno.ENOTDIR
    with top.open_directory(b"d") as inner:
        write(root, inner, b"g")
    assert code(lambda: top.rmdir(b"d")) in (errno.ENOTEMPTY, errno.EEXIST)
    top.unlink(b"l")
    assert content(root, root.open_directory((b"d",)), b"g") == b""
    top.unlink(b"f")
    assert code(lambda: top.unlink(b"f")) == errno.ENOENT
    assert names(top) == [b"d"]


def test_nothing_is_made_in_a_removed_folder(root: Root, top: Directory) -> None:
    with root.make_directories((b"d",)) as directory:
        top.rmdir(b"d")
        assert names(directory) == []
        assert code(lambda: directory.create_temporary(b"f")) == errno.ENOENT
        assert code(lambda: directory.mkdir(b"f")) == errno.ENOENT


def test_an_open_file_survives_its_removal(root: Root, top: Directory) -> None:
    write(root, top, b"f", b"still")
    fd = top.open_read(b"f")
    top.unlink(b"f")
    assert read(root, fd) == b"still"


# --- the root --------------------------------------------------------------------------------------------


def test_the_root_as_a_whole(root: Root) -> None:
    root.check_present()
    assert root.free_bytes() > 0
    assert root.identity() == (root.stat(()).device, root.stat(()).inode)
    with root.open_directory(()) as top:
        if top.disk() is not None:
            top.sync_disk()


def test_closing_twice_is_harmless(root: Root) -> None:
    directory = root.open_directory(())
    directory.close()
    directory.close()
    assert code(lambda: directory.create_temporary(b"x")) == errno.EBADF
    assert code(lambda: next(directory.scan())) == errno.EBADF


def test_handles_of_other_roots_are_refused(root: Root, top: Directory, tmp_path: Path) -> None:
    write(root, top, b"f")
    (tmp_path / "other").mkdir()
    with open_root(str(tmp_path / "other")) as other, other.open_directory(()) as elsewhere:
        assert code(lambda: top.rename(b"f", b"g", elsewhere)) == errno.EXDEV
        assert code(lambda: top.rename_no_replace(b"f", b"g", elsewhere)) == errno.EXDEV


def test_a_node_of_a_plain_stat(tmp_path: Path) -> None:
    node = node_from_stat(b"x", os.lstat(tmp_path))
    assert (node.kind, node.name) == ("dir", b"x")
    assert node.mode == os.lstat(tmp_path).st_mode & 0o7777


# --- names and attributes of one file ----------------------------------------------------------------------


def test_one_file_with_several_names(root: Root, top: Directory) -> None:
    write(root, top, b"one", b"content")
    top.mkdir(b"folder")
    with top.open_directory(b"folder") as folder:
        top.link(b"one", b"two", folder)
        assert content(root, folder, b"two") == b"content"
        assert folder.lstat(b"two").inode == top.lstat(b"one").inode
        assert (top.lstat(b"one").nlink, folder.lstat(b"two").nlink) == (2, 2)
        with pytest.raises(NotRegularFile):
            folder.open_temporary(b"two")
        assert code(lambda: top.link(b"one", b"two", folder)) == errno.EEXIST
        # Two names of one file: nothing is replaced, and both stay.
        folder.rename(b"two", b"one", top)
        assert content(root, top, b"one") == b"content"
        top.unlink(b"one")
        assert content(root, folder, b"two") == b"content"
        assert folder.lstat(b"two").nlink == 1


def test_what_gets_no_second_name(root: Root, top: Directory) -> None:
    top.mkdir(b"folder")
    assert code(lambda: top.link(b"folder", b"again")) == errno.EPERM
    assert code(lambda: top.link(b"nothing", b"again")) == errno.ENOENT
    for name in (b"..", b"a/b", b"", b"a\0"):
        write(root, top, b"file-" + name.hex().encode())
        with pytest.raises(IllegalName):
            top.link(b"file-" + name.hex().encode(), name)
    top.symlink(b"link", b"/etc/passwd")
    top.link(b"link", b"same link")
    # The link itself has two names; what it leads to has not.
    assert top.lstat(b"same link").kind == "symlink"


def test_attributes_of_an_open_file(root: Root, top: Directory) -> None:
    fd = top.create_temporary(b"file")
    try:
        try:
            root.set_attribute(fd, b"colour", b"green\0")
        except OSError as error:
            pytest.skip(f"no extended attributes here: {error}")
        root.set_attribute(fd, b"colour", b"blue")
        root.set_attribute(fd, b"\xff", b"")
        assert root.get_attributes(fd) == Found([(b"colour", b"blue"), (b"\xff", b"")])
        assert code(lambda: root.set_attribute(fd, b"towpath.root", b"")) == errno.EINVAL
    finally:
        root.close_file(fd)

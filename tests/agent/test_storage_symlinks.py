"""Symlinks in every storage: where they lead, where not, and what of them is kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.storage.base import Directory, IllegalName, NotRegularFile, Root
from agent.storage.faulty import FaultyRoot
from agent.storage.memory import MemoryRoot
from agent.storage.reach import LeavesCollection, LeavesReach, Reach
from tests.agent.storage_cases import DAY, OLD, code, content, names, root, top, write

__all__ = ["root", "top"]


# --- symlinks --------------------------------------------------------------------------------------------


@pytest.fixture()
def tree(root: Root, top: Directory, tmp_path: Path) -> Root:
    """a/b/f and links of every kind."""
    with root.make_directories((b"a", b"b")) as directory:
        write(root, directory, b"f", b"inside")
        directory.symlink(b"up", b"..")
        directory.symlink(b"up2", b"../..")
        directory.symlink(b"out", b"../../../x")
        directory.symlink(b"f_by_up", b"../b/./f")
        directory.symlink(b"chain", b"chain2")
        directory.symlink(b"chain2", b"/" + os.fsencode(tmp_path / "root").lstrip(b"/") + b"/a/b")
    top.symlink(b"abs", os.fsencode(tmp_path / "root" / "a"))
    top.symlink(b"abs_root", os.fsencode(tmp_path / "root"))
    top.symlink(b"abs_sly", os.fsencode(tmp_path / "root") + b"/../root/a")
    top.symlink(b"abs_like", os.fsencode(tmp_path / "root") + b"er/a")
    top.symlink(b"etc", b"/etc")
    top.symlink(b"slash", b"/")
    top.symlink(b"above", b"..")
    top.symlink(b"loop", b"loop")
    top.symlink(b"ping", b"pong/x")
    top.symlink(b"pong", b"ping/x")
    top.symlink(b"dangling", b"nothing")
    top.symlink(b"under_file", b"a/b/f/x")
    top.symlink(b"trailing", b"a/b/")
    return root


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ((b"abs",), (b"a",)),
        ((b"abs", b"b"), (b"a", b"b")),
        ((b"abs_root",), ()),
        ((b"abs_root", b"abs", b"b"), (b"a", b"b")),
        ((b"a", b"b", b"up"), (b"a",)),
        ((b"a", b"b", b"up2"), ()),
        ((b"abs", b"b", b"up", b"b"), (b"a", b"b")),
        ((b"a", b"b", b"chain"), (b"a", b"b")),
        ((b"trailing",), (b"a", b"b")),
    ],
)
def test_links_inside_are_followed(tree: Root, path: tuple[bytes, ...], where: tuple[bytes, ...]) -> None:
    with tree.open_directory(path) as directory:
        assert directory.path == where
        assert directory.status().inode == tree.stat(where).inode
    with tree.make_directories((*path, b"new")) as directory:
        assert directory.path == (*where, b"new")
    assert tree.stat(path).kind == "dir"
    parent, name = tree.open_parent(path)
    with parent:
        assert parent.lstat(name).kind == "symlink" or name == b"b"
        if parent.lstat(name).kind == "symlink":
            assert code(lambda: parent.open_directory(name)) == errno.ENOTDIR
        with parent.open_directory(name, follow=True) as directory:
            assert directory.path == where


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((b"etc",), errno.EXDEV),
        ((b"etc", b"passwd"), errno.EXDEV),
        ((b"slash",), errno.EXDEV),
        ((b"above",), errno.EXDEV),
        ((b"above", b"root"), errno.EXDEV),
        ((b"a", b"b", b"out"), errno.EXDEV),
        ((b"a", b"b", b"up2", b"above"), errno.EXDEV),
        ((b"abs_sly",), errno.EXDEV),
        ((b"abs_like",), errno.EXDEV),
        ((b"loop",), errno.ELOOP),
        ((b"loop", b"x"), errno.ELOOP),
        ((b"ping",), errno.ELOOP),
        ((b"dangling",), errno.ENOENT),
        ((b"nothing",), errno.ENOENT),
        ((b"nothing", b"x"), errno.ENOENT),
        ((b"under_file",), errno.ENOTDIR),
        ((b"a", b"b", b"f", b"x"), errno.ENOTDIR),
    ],
)
def test_links_that_lead_nowhere_or_out(tree: Root, path: tuple[bytes, ...], expected: int) -> None:
    assert code(lambda: tree.open_directory(path)) == expected
    assert code(lambda: tree.stat(path)) == expected
    if expected == errno.EXDEV:
        with pytest.raises(LeavesCollection):
            tree.make_directories((*path, b"new"))
        with pytest.raises(LeavesCollection):
            tree.open_parent((*path, b"new"))


def test_following_the_last_component(tree: Root) -> None:
    with tree.open_directory((b"a", b"b")) as directory:
        assert content(tree, directory, b"f_by_up", follow=True) == b"inside"
        assert directory.stat(b"f_by_up").size == 6
        assert directory.readlink(b"out") == b"../../../x"
        assert code(lambda: directory.readlink(b"f")) == errno.EINVAL
        for name in (b"out",):
            with pytest.raises(LeavesCollection):
                directory.open_read(name, follow=True)
            with pytest.raises(LeavesCollection):
                directory.stat(name)
            with pytest.raises(LeavesCollection):
                directory.set_times(name, OLD, follow=True)
            with pytest.raises(LeavesCollection):
                directory.open_directory(name, follow=True)
        directory.set_times(b"f_by_up", OLD, follow=True)
        assert directory.lstat(b"f").mtime_ns == OLD
        directory.set_times(b"up", OLD, follow=True)
    assert tree.stat((b"a",)).mtime_ns == OLD


def test_making_folders_below_a_dangling_link_stays_inside(tree: Root) -> None:
    with tree.make_directories((b"dangling", b"x")) as directory:
        assert directory.path == (b"nothing", b"x")


def test_times_and_modes_of_a_link_itself(root: Root, top: Directory) -> None:
    write(root, top, b"f")
    top.symlink(b"l", b"f")
    before = top.lstat(b"f")
    top.set_times(b"l", OLD)
    assert top.lstat(b"l").mtime_ns == OLD
    with pytest.raises(NotRegularFile):
        top.set_mode(b"l", 0o777)
    assert top.lstat(b"f") == before
    top.mkdir(b"d")
    top.set_times(b"d", OLD - DAY)
    assert top.lstat(b"d").mtime_ns == OLD - DAY
    top.set_times(b"d", -DAY)
    assert top.lstat(b"d").mtime_ns == -DAY
    assert code(lambda: top.set_times(b"d", 1 << 70)) == errno.EINVAL


def test_link_texts_are_bytes_and_kept(root: Root, top: Directory) -> None:
    for number, text in enumerate([b"\xff", b"../../../../etc/passwd", b"/", b"a//b/./", b"x" * 4000, b"a\nb"]):
        top.symlink(b"%d" % number, text)
        assert top.readlink(b"%d" % number) == text
    assert code(lambda: top.symlink(b"0", b"x")) == errno.EEXIST
    with pytest.raises(IllegalName):
        top.symlink(b"n", b"a\0b")


# --- reach -----------------------------------------------------------------------------------------------

OPEN = (b"open",)


@pytest.fixture()
def narrow(root: Root) -> Iterator[Root]:
    """A root of which one folder is open; another holds a secret, and links lead to it in every way there is."""
    for path in ((b"open", b"sub"), (b"secret", b"sub")):
        root.make_directories(path).close()
    with root.open_directory((b"secret",)) as secret, root.open_directory(OPEN) as folder:
        write(root, secret, b"f", b"not for you")
        write(root, folder, b"f", b"for you")
        for name, target in {
            b"file": b"../secret/f",
            b"folder": b"../secret",
            b"missing": b"../secret/none",
            b"top": b"..",
            b"chain": b"folder/sub",
            b"back": b"../secret/../open/f",
            b"fine": b"../open/f",
            b"fine-folder": b"sub",
        }.items():
            folder.symlink(name, target)
    with root.narrowed(Reach((OPEN,))) as narrowed:
        yield narrowed


@pytest.mark.parametrize("name", [b"file", b"folder", b"top", b"chain"])
def test_a_link_out_of_reach_leads_nowhere(root: Root, narrow: Root, name: bytes) -> None:
    link = (*OPEN, name)
    with narrow.open_directory(OPEN) as folder:
        calls: list[Callable[[], object]] = [
            lambda: narrow.stat(link),
            lambda: narrow.open_directory(link),
            lambda: folder.stat(name),
            lambda: folder.open_read(name, follow=True),
            lambda: folder.open_directory(name, follow=True),
            lambda: folder.set_times(name, OLD, follow=True),
        ]
        if name != b"file":
            calls += [
                lambda: narrow.open_directory((*link, b"sub")),
                lambda: narrow.open_parent((*link, b"f")),
                lambda: narrow.make_directories((*link, b"made")),
            ]
        # Memory resolves a way to its end before it looks how far it may go; it holds no secrets of users.
        in_memory = isinstance(root, MemoryRoot | FaultyRoot)
        for call in calls:
            assert code(call) in ((errno.EACCES, errno.ENOTDIR, errno.ENOENT) if in_memory else (errno.EACCES,))
        # Without following, a link is an entry like any other.
        assert folder.lstat(name).kind == "symlink"
    for place in ((), (b"secret",), (b"secret", b"sub")):
        with root.open_directory(place) as looked:
            assert b"made" not in names(looked)


def test_whether_something_out_of_reach_exists_is_not_told(root: Root, narrow: Root) -> None:
    if isinstance(root, MemoryRoot | FaultyRoot):
        pytest.skip("memory resolves such a way to its end first; it holds no secrets of users")
    with narrow.open_directory(OPEN) as folder:
        for name in (b"file", b"missing", b"back"):
            with pytest.raises(LeavesReach):
                folder.stat(name)


def test_a_link_within_reach_leads_where_it_says(narrow: Root) -> None:
    with narrow.open_directory(OPEN) as folder:
        assert content(narrow, folder, b"fine", follow=True) == b"for you"
        assert narrow.stat((*OPEN, b"fine-folder")).kind == "dir"
        with narrow.make_directories((*OPEN, b"fine-folder", b"new")) as made:
            assert made.path == (b"open", b"sub", b"new")


def test_a_folder_reached_by_name_is_not_looked_at_again(narrow: Root) -> None:
    # Whoever asks by name has checked the name; only links are in doubt.
    parent, name = narrow.open_parent(OPEN)
    with parent:
        assert parent.stat(name).kind == "dir"


def test_a_narrowed_root_stands_beside_the_whole(root: Root, narrow: Root) -> None:
    with root.narrowed(Reach(())) as nothing, pytest.raises(LeavesReach):
        nothing.stat((*OPEN, b"fine"))
    assert narrow.stat((*OPEN, b"fine")).kind == "file"
    assert root.stat((*OPEN, b"file")).kind == "file"

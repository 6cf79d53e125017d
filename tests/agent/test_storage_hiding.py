"""With ``hidden: denied`` names that begin with a dot do not exist, whichever way somebody comes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.storage.base import Root
from agent.storage.hiding import HiddenDenied, HidingRoot, is_hidden
from agent.storage.posix import PosixDirectory, open_root
from protocol.names import RESERVED_PREFIX


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    # The root's own place may be hidden: that is the owner's choice.
    top = tmp_path / ".config" / "root"
    (top / ".ssh").mkdir(parents=True)
    (top / ".ssh" / "key").write_text("secret")
    (top / "open").mkdir()
    (top / "open" / "file").write_text("public")
    (top / "open" / ".inner").write_text("secret")
    os.symlink(".ssh/key", top / "key")
    os.symlink(".ssh", top / "folder")
    os.symlink("folder/key", top / "chain")
    os.symlink("open/../.ssh/key", top / "around")
    os.symlink(top / ".ssh" / "key", top / "absolute")
    os.symlink("key", top / "second")
    os.symlink("open/file", top / "good")
    os.symlink("open", top / "opened")
    with HidingRoot(open_root(str(top))) as made:
        yield made


def test_listings_leave_hidden_names_out(root: Root) -> None:
    with root.open_directory(()) as directory:
        names = {node.name for node in directory.scan()}
    assert b".ssh" not in names
    assert {b"open", b"good"} <= names


@pytest.mark.parametrize("path", [(b".ssh",), (b".ssh", b"key"), (b"open", b".inner"), (b"opened", b".inner")])
def test_hidden_names_cannot_be_asked_for(root: Root, path: tuple[bytes, ...]) -> None:
    with pytest.raises(HiddenDenied):
        root.stat(path)
    with pytest.raises(HiddenDenied):
        root.open_directory(path)
    with pytest.raises(HiddenDenied):
        root.open_parent(path)
    with pytest.raises(HiddenDenied):
        root.make_directories(path)


@pytest.mark.parametrize("name", [b"key", b"chain", b"around", b"absolute", b"second"])
def test_no_symlink_leads_to_a_hidden_file(root: Root, name: bytes) -> None:
    with root.open_directory(()) as directory:
        for call in (directory.stat, lambda n: directory.open_read(n, follow=True)):
            with pytest.raises(HiddenDenied):
                call(name)
    with pytest.raises(HiddenDenied):
        root.stat((name,))


@pytest.mark.parametrize("name", [b"good", b"plain"])
def test_a_link_that_is_changed_after_the_look_leads_to_no_hidden_file(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    """By somebody with an account on this machine, between the look at it and the opening."""
    path = tmp_path / ".config" / "root" / name.decode()
    (tmp_path / ".config" / "root" / "plain").write_text("public")
    opening, swapped = PosixDirectory.open_anything, []

    def swap_and_open(directory: PosixDirectory, asked: bytes, *, follow: bool) -> int:
        swapped.append(asked)
        # A link is opened once to be looked at.
        if len(swapped) == (2 if name == b"good" else 1):
            path.unlink()
            path.symlink_to(".ssh/key")
        return opening(directory, asked, follow=follow)

    with root.open_directory(()) as directory:
        monkeypatch.setattr(PosixDirectory, "open_anything", swap_and_open)
        with pytest.raises(HiddenDenied):
            root.read_whole(directory, name, memoryview(bytearray(6)), follow=True)
    assert path.is_symlink()


def test_a_link_that_is_changed_while_it_is_looked_at_tells_nothing_of_a_hidden_file(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever of the looks: it is what can be seen that is told, or nothing."""
    path = tmp_path / ".config" / "root" / "good"
    (tmp_path / ".config" / "root" / ".ssh" / "key").write_text("a secret of another size")

    def point(target: str) -> None:
        path.unlink()
        path.symlink_to(target)

    following = PosixDirectory._follow
    targets: list[str] = []

    def swap_and_follow(directory: PosixDirectory, name: bytes) -> Any:
        point(targets.pop(0) if targets else "open/file")
        return following(directory, name)

    monkeypatch.setattr(PosixDirectory, "_follow", swap_and_follow)
    told = []
    for look in range(3):
        targets[:] = ["open/file"] * look + [".ssh/key"]
        point("open/file")
        with root.open_directory(()) as directory, suppress(HiddenDenied):
            told.append(directory.stat(b"good").size)
    assert told and set(told) == {6}, told


def test_no_symlink_leads_into_a_hidden_folder(root: Root) -> None:
    with pytest.raises(HiddenDenied):
        root.open_directory((b"folder",))
    with pytest.raises(HiddenDenied):
        root.stat((b"folder", b"key"))
    with root.open_directory(()) as directory, pytest.raises(HiddenDenied):
        directory.open_directory(b"folder", follow=True)


def test_other_links_and_files_work(root: Root) -> None:
    assert root.stat((b"good",)).size == 6
    assert root.stat((b"opened", b"file")).size == 6
    with root.open_directory((b"opened",)) as directory:
        fd = directory.open_read(b"file", follow=True)
        assert os.read(fd, 10) == b"public"
        os.close(fd)


def test_hidden_names_cannot_be_made(root: Root) -> None:
    with root.open_directory(()) as directory:
        for call in (directory.mkdir, directory.create_temporary, directory.unlink, directory.rmdir):
            with pytest.raises(HiddenDenied):
                call(b".new")
        for names in ((b"good", b".new"), (b".ssh", b"new")):
            with pytest.raises(HiddenDenied):
                directory.rename(*names)
            with pytest.raises(HiddenDenied):
                directory.rename_no_replace(*names)
        with pytest.raises(HiddenDenied):
            directory.symlink(b".new", b"x")


def test_temporaries_of_transfers_are_let_through(root: Root) -> None:
    name = RESERVED_PREFIX + b"x"
    assert not is_hidden(name)
    with root.open_directory(()) as directory:
        os.close(directory.create_temporary(name))
        assert name in {node.name for node in directory.scan(reserved=True)}
        directory.rename(name, b"done")

"""The agent's own folders and files below a collection's root: not there for anybody who comes through it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.storage.base import Directory, Root
from agent.storage.guarded import GuardedDirectory, open_guarded
from agent.storage.listing import Accounts, list_directory, stat_entry
from agent.storage.own_files import AgentsOwn, HoldsOwn
from agent.storage.own_links import OwnLinks
from agent.storage.posix import PosixDirectory
from agent.storage.query import Query
from agent.storage.reach import Reach
from protocol.errors import ItemFailed
from protocol.names import CollectionPath
from tests.agent.own_home import fill, home, names, own

__all__ = ["home", "own"]

STATE: CollectionPath = (b".local", b"state", b"towpath", b"agent")
CONFIG: CollectionPath = (b"conf", b"agent.yaml")


@pytest.fixture(params=["whole", "narrowed"])
def root(request: pytest.FixtureRequest, home: Path, own: tuple[str, ...]) -> Iterator[Root]:
    with open_guarded(str(home), own=own) as opened:
        if request.param == "whole":
            yield opened
        else:
            with opened.narrowed(Reach(((),))) as narrowed:
                yield narrowed


def test_they_are_not_listed_and_not_found(root: Root) -> None:
    assert names(root, *STATE[:-1]) == set()
    assert names(root, b"conf") == {b"mine"}
    accounts = Accounts()
    for path in (STATE, (*STATE, b"node.key"), CONFIG):
        with pytest.raises(FileNotFoundError):
            root.stat(path)
        with pytest.raises(ItemFailed, match="does not exist") as caught:
            stat_entry(root, path, accounts)
        assert caught.value.code == "NOT_FOUND"
        with pytest.raises(FileNotFoundError):
            root.open_directory(path)
    with pytest.raises(ItemFailed):
        list_directory(root, STATE, Query(), accounts)
    assert list_directory(root, (b"conf",), Query(), accounts).total == 1
    with root.open_directory(STATE[:-1]) as folder, pytest.raises(FileNotFoundError):
        folder.open_directory(b"agent")
    with root.open_directory((b"conf",)) as folder:
        for look in (folder.lstat, folder.stat, folder.open_read, folder.readlink, folder.unlink):
            with pytest.raises(FileNotFoundError):
                look(b"agent.yaml")
        with pytest.raises(FileNotFoundError):
            root.read_whole(folder, b"agent.yaml", memoryview(bytearray(9)))
        assert root.read_whole(folder, b"mine", memoryview(bytearray(9)))[0] == 5


def test_no_link_leads_to_them(home: Path, root: Root) -> None:
    for name, target in (
        ("folder", ".local/state/towpath/agent"),
        ("key", ".local/state/towpath/agent/node.key"),
        ("absolute", str(home / "conf/agent.yaml")),
        ("twice", "key"),
        ("up", "work/../.local/state/towpath/agent/../agent/node.key"),
    ):
        (home / name).symlink_to(target)
        with root.open_directory(()) as top:
            for follow in (top.stat, lambda n, top=top: top.open_read(n, follow=True)):
                with pytest.raises(FileNotFoundError):
                    follow(os.fsencode(name))
            with pytest.raises(OSError, match=r"No such file|Not a directory"):
                top.open_directory(os.fsencode(name), follow=True)
            with pytest.raises(FileNotFoundError):
                top.set_times(os.fsencode(name), 0, follow=True)
    types = {row.name: row.type for row in list_directory(root, (), Query(), Accounts()).entries}
    assert {types[name] for name in ("folder", "key", "absolute", "twice", "up")} == {"invalid_symlink"}


def test_nothing_is_put_in_their_place_and_the_way_to_them_stays(home: Path, root: Root) -> None:
    with root.open_directory(()) as top, root.open_directory((b"conf",)) as conf:
        temporary = b".towpath.t.x"
        os.close(conf.create_temporary(temporary))
        os.close(top.create_temporary(temporary))
        for source in (conf, top):
            with pytest.raises(AgentsOwn):
                source.rename(temporary, b"agent.yaml", conf)
            with pytest.raises(AgentsOwn):
                source.link(temporary, b"agent.yaml", conf)
            with pytest.raises(AgentsOwn):
                source.rename_no_replace(temporary, b"agent.yaml", conf)
        with pytest.raises(AgentsOwn):
            conf.rename(temporary, b"agent.yaml")
        for make in (conf.mkdir, lambda name: conf.symlink(name, b"mine"), conf.create_temporary):
            with pytest.raises(AgentsOwn):
                make(b"agent.yaml")
        for old in (b".local", b"conf"):
            with pytest.raises(HoldsOwn):
                top.rename(old, b"moved")
            with pytest.raises(HoldsOwn):
                top.rename_no_replace(old, b"moved")
        with pytest.raises(FileNotFoundError):
            conf.rename(b"agent.yaml", b"moved")
        conf.rename(temporary, b"new")
    with pytest.raises(AgentsOwn):
        root.make_directories((*STATE, b"tasks"))
    assert (home / "conf/agent.yaml").read_text() == "secret"
    assert (home / "conf/new").exists()


def test_nothing_is_done_with_them_as_if_they_were_not_there(home: Path, root: Root) -> None:
    """A second name would show a file everywhere; and one that is no folder must not be told from one that is not."""
    file = home / "conf/agent.yaml"
    file.chmod(0o600)
    os.utime(file, (1, 1))
    before = file.stat()
    with root.open_directory((b"conf",)) as conf, root.open_directory((b"work",)) as work:
        for call in (
            lambda: conf.link(b"agent.yaml", b"second"),
            lambda: conf.link(b"agent.yaml", b"second", work),
            lambda: conf.open_directory(b"agent.yaml"),
            lambda: conf.open_directory(b"agent.yaml", follow=True),
            lambda: conf.open_temporary(b"agent.yaml"),
            lambda: conf.set_times(b"agent.yaml", 10**18),
            lambda: conf.set_times(b"agent.yaml", 10**18, follow=True),
            lambda: conf.set_mode(b"agent.yaml", 0o666),
            lambda: conf.readlink(b"agent.yaml"),
            lambda: conf.open_read(b"agent.yaml", follow=True),
            lambda: conf.rmdir(b"agent.yaml"),
            lambda: conf.unlink(b"agent.yaml"),
        ):
            with pytest.raises(FileNotFoundError):
                call()
    after = file.stat()
    assert [(found.st_mode, found.st_mtime_ns, found.st_nlink) for found in (before, after)] == [
        (0o100600, 10**9, 1)
    ] * 2


def test_beside_them_everything_works_as_elsewhere(home: Path, root: Root) -> None:
    place = home / "conf"
    with root.open_directory((b"conf",)) as conf:
        assert type(conf) is GuardedDirectory
        conf.mkdir(b"folder", 0o700)
        assert (place / "folder").stat().st_mode & 0o777 == 0o700
        conf.mkdir(b"usual")
        assert (place / "usual").stat().st_mode & 0o700 == 0o700
        conf.rmdir(b"usual")
        conf.symlink(b"link", b"folder")
        with pytest.raises(NotADirectoryError):
            conf.open_directory(b"link")
        conf.open_directory(b"link", follow=True).close()
        os.close(conf.create_temporary(b".towpath.t.x"))
        assert (place / ".towpath.t.x").stat().st_mode & 0o777 == 0o600
        os.close(conf.open_temporary(b".towpath.t.x"))
        assert {node.name for node in conf.scan()} == {b"mine", b"folder", b"link"}
        with pytest.raises(FileExistsError):
            conf.rename(b".towpath.t.x", b"link", replace_symlink=False)
        conf.rename(b".towpath.t.x", b"link")
        assert not (place / "link").is_symlink()
        conf.set_mode(b"link", 0o4711)
        assert (place / "link").stat().st_mode & 0o7777 == 0o711
        conf.set_mode(b"link", 0o4711, special=True)
        assert (place / "link").stat().st_mode & 0o7777 == 0o4711
        conf.symlink(b"other", b"link")
        conf.set_times(b"other", 10**18)
        assert (place / "other").lstat().st_mtime_ns == 10**18 != (place / "link").stat().st_mtime_ns
        conf.set_times(b"other", 2 * 10**18, follow=True)
        assert (place / "link").stat().st_mtime_ns == 2 * 10**18
        conf.rmdir(b"folder")
        assert {path.name for path in place.iterdir()} == {"agent.yaml", "mine", "link", "other"}


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_moved_to_where_the_way_to_them_begins(home: Path, there: bool) -> None:
    """A folder that holds one of their names would be theirs as soon as it has the name of the folder above."""
    fill(home)
    (home / "prepared/else").mkdir(parents=True)
    if there:
        (home / "nowhere").mkdir()
    with open_guarded(str(home), own=[str(home / "nowhere/else")]) as root, root.open_directory(()) as top:
        for move in (top.rename, top.rename_no_replace):
            with pytest.raises(AgentsOwn):
                move(b"prepared", b"nowhere")
        with root.open_directory((b"work",)) as work:
            work.mkdir(b"prepared")
            for move in (work.rename, work.rename_no_replace):
                with pytest.raises(AgentsOwn):
                    move(b"prepared", b"nowhere", top)
    assert not (home / "nowhere/else").exists()


@pytest.mark.parametrize(
    "path",
    [(b"conf", b"agent.overlay.yaml"), (b"conf", b"more"), (b"nowhere", b"else"), (b"nowhere", b"else", b"below")],
    ids=lambda path: "/".join(map(os.fsdecode, path)),
)
def test_nobody_makes_what_is_not_there_yet_or_enters_it_when_it_is(home: Path, path: CollectionPath) -> None:
    """The folder of the default configuration, and overlays: who could make one would decide what it says."""
    fill(home)
    (home / "link").symlink_to(home / os.fsdecode(b"/".join(path)))
    places = [str(home / place) for place in ("conf/agent.overlay.yaml", "conf/more", "nowhere/else")]
    with open_guarded(str(home), own=places) as root:
        with pytest.raises(AgentsOwn):
            root.make_directories(path)
        with root.make_directories(path[:1]) as folder, pytest.raises(AgentsOwn):
            folder.mkdir(path[1])
        with root.open_directory(()) as top, top.open_directory(path[0]) as folder, pytest.raises(AgentsOwn):
            folder.mkdir(path[1])
        assert not (home / os.fsdecode(b"/".join(path[:2]))).exists()
        # The agent, or its owner, makes it while the root is open.
        (home / os.fsdecode(b"/".join(path))).mkdir(parents=True)
        for way in (path, (b"link",)):
            with pytest.raises(FileNotFoundError):
                root.open_directory(way)
        with root.open_directory(path[:1]) as folder:
            assert path[1] not in {node.name for node in folder.scan()}


def test_only_folders_that_hold_some_are_looked_through(root: Root) -> None:
    """Elsewhere a file costs what it costs without them."""
    with root.open_directory((b"work",)) as ordinary, root.open_directory((b"conf",)) as holding:
        assert type(ordinary) is PosixDirectory
        assert type(holding) is GuardedDirectory


def test_another_mount_of_them_is_not_entered(tmp_path: Path, home: Path, root: Root) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = home / "work" / "mounted"
    place.mkdir()
    state = home / ".local/state/towpath/agent"
    if subprocess.run(["mount", "--bind", state, place], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(FileNotFoundError):
            root.open_directory((b"work", b"mounted"))
        with root.open_directory((b"work",)) as folder, pytest.raises(FileNotFoundError):
            folder.open_directory(b"mounted")
    finally:
        # Whatever has it open: a mount that stays would be in the way of everybody who cleans up.
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_link_to_the_configuration_is_the_agents_own_too(home: Path) -> None:
    (home / "dotfiles").mkdir()
    (home / "dotfiles/agent.yaml").write_text("secret")
    (home / "agent.yaml").symlink_to("dotfiles/agent.yaml")
    with open_guarded(str(home), own=[str(home / "agent.yaml")]) as root:
        assert names(root) == {b"dotfiles"}
        assert names(root, b"dotfiles") == set()


def test_other_spellings_are_the_agents_own_only_where_they_are_the_same_file(home: Path, own: tuple[str, ...]) -> None:
    """As on file systems where case does not count, which show one file under many names; a second name plays that."""
    conf = home / "conf"
    os.link(conf / "agent.yaml", conf / "AGENT.yaml")
    (conf / "Agent.yaml").write_text("somebody's")
    (conf / "agent.YAML").symlink_to("agent.yaml")
    with open_guarded(str(home), own=own) as root, root.open_directory((b"conf",)) as folder:
        assert names(root, b"conf") == {b"mine", b"Agent.yaml", b"agent.YAML"}
        with pytest.raises(FileNotFoundError):
            folder.open_read(b"AGENT.yaml")
        os.close(folder.open_read(b"Agent.yaml"))
        # One that is not there is nobody's.
        folder.mkdir(b"AgenT.yaml")


def test_other_names_of_them_are_not_there(home: Path, root: Root) -> None:
    """Hard links, as backups and what saves space make them: before the root was opened, and while it is open."""
    key, config = home / ".local/state/towpath/agent/node.key", home / "conf/agent.yaml"
    (home / "to-key").symlink_to("work/key")
    for name, file in (("key", key), ("yaml", config)):
        place = home / "work" / name
        assert names(root, b"work") == {b"a"}
        os.link(file, place)
        asked = os.fsencode(name)
        assert names(root, b"work") == {b"a"}
        with pytest.raises(FileNotFoundError):
            root.stat((b"work", asked))
        with root.open_directory((b"work",)) as folder:
            for look in (folder.lstat, folder.stat, folder.open_read):
                with pytest.raises(FileNotFoundError):
                    look(asked)
            with pytest.raises(FileNotFoundError):
                root.read_whole(folder, asked, memoryview(bytearray(9)))
            with pytest.raises(ItemFailed):
                stat_entry(root, (b"work", asked), Accounts())
        with root.open_directory(()) as top:
            for follow in (top.stat, lambda n, top=top: top.open_read(n, follow=True)):
                with pytest.raises(FileNotFoundError):
                    follow(b"to-key")
        # Who removes or replaces such a name changes nothing of the agent's.
        with root.open_directory((b"work",)) as folder:
            folder.unlink(asked)
        assert file.read_text() == "secret"


def test_other_files_with_several_names_are_there(home: Path, root: Root) -> None:
    os.link(home / "work/a", home / "work/b")
    os.link(home / ".local/state/towpath/agent/node.key", home / "work/key")
    assert names(root, b"work") == {b"a", b"b"}
    with root.open_directory((b"work",)) as folder:
        assert root.read_whole(folder, b"b", memoryview(bytearray(9)))[0] == 5
    # Nobody's any more but the name's.
    (home / ".local/state/towpath/agent/node.key").unlink()
    assert names(root, b"work") == {b"a", b"b", b"key"}


def test_the_agents_own_are_looked_through_for_other_names_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree of hard links costs one look a minute; a new one costs one more, those from the future one a second."""
    (tmp_path / "state" / "inner").mkdir(parents=True)
    key = tmp_path / "state" / "inner" / "key"
    key.write_text("secret")
    now, looks, real = [1000.0], [0], OwnLinks._look

    def look(links: OwnLinks) -> Iterator[tuple[int, int]]:
        looks[0] += 1
        return real(links)

    def status(inode: int, age: float) -> Any:
        ctime_ns = int((now[0] - age) * 1e9)
        return SimpleNamespace(
            st_nlink=2, st_mode=0o100600, st_ctime_ns=ctime_ns, st_dev=key.stat().st_dev, st_ino=inode
        )

    monkeypatch.setattr(OwnLinks, "_look", look)
    clock = SimpleNamespace(monotonic=lambda: now[0], time_ns=lambda: int(now[0] * 1e9))
    monkeypatch.setattr("agent.storage.own_links.time", clock)
    links = OwnLinks([str(tmp_path / "state")])

    def holds(inode: int, age: float) -> tuple[bool, int]:
        return links.hold(status(inode, age)), looks[0]

    assert {holds(number, 100.0) for number in range(1, 100)} == {(False, 1)}
    now[0] += 30.0
    os.link(key, tmp_path / "other")
    assert holds(key.stat().st_ino, 1.0) == (True, 2)
    assert {holds(number, 1.0) for number in range(1, 100)} == {(False, 2)}
    now[0] += 1.0
    assert {holds(number, -1000.0) for number in range(1, 100)} == {(False, 3)}
    now[0] += 60.0
    assert holds(1, 100.0) == (False, 4)


def test_errors_are_as_the_system_says_them() -> None:
    assert (AgentsOwn().errno, HoldsOwn().errno) == (errno.EACCES, errno.ENOTEMPTY)
    assert issubclass(GuardedDirectory, Directory)

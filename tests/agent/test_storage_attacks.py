"""Attempts to break out of a root: hostile names, and a thread that swaps what is there for links while we work.

Outside the root stands a folder of canaries; whatever happens inside, it must stay as it was to the last byte.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.storage.base import Directory, Root
from agent.storage.posix import open_root
from agent.storage.reach import LeavesCollection
from protocol.errors import ProtocolError
from protocol.names import escape, parse_path_untrusted
from tests.agent.hostile_grounds import SECRET, Attacker, Grounds


@pytest.fixture()
def grounds(tmp_path: Path) -> Grounds:
    return Grounds(tmp_path)


def is_below(fd: int, identity: tuple[int, int]) -> bool:
    """Walk from an open folder up by the kernel's own `..` until the root or the end of the world."""
    fd = os.dup(fd)
    try:
        while True:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == identity:
                return True
            up = os.open("..", os.O_PATH | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = up
            above = os.fstat(fd)
            if (above.st_dev, above.st_ino) == (status.st_dev, status.st_ino):
                return False
    finally:
        os.close(fd)


# --- names -----------------------------------------------------------------------------------------------

PIECES = [
    "..",
    ".",
    "~",
    "/",
    "//",
    "\\",
    "..\\",
    "C:",
    "\\\\server\\share",
    "file:stream",
    "CON",
    "COM1 ",
    "COM¹",
    "x.",
    "x ",
    "\u202e",
    "\u200b",
    "é",
    "e\u0301",
    "␛2E",
    "␛2F",
    "␛FF",
    "␛00",
    "\0",
    "\n",
    "out",
    "up",
    "a",
    "x" * 255,
    "x" * 256,
    "x/" * 600,
    "\ud800",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_accepted_names_stay_below_by_inode(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    grounds = Grounds(tmp_path_factory.mktemp("names"))
    (grounds.inside / "a").mkdir()
    os.symlink(grounds.outside, grounds.inside / "out")
    os.symlink("..", grounds.inside / "a" / "up")
    os.symlink("../..", grounds.inside / "a" / "out")
    with open_root(str(grounds.inside)) as root:
        try:
            path = parse_path_untrusted(text, (b"a",))
        except ProtocolError:
            return
        with contextlib.suppress(OSError), root.make_directories(path, durable=False) as directory:
            assert is_below(directory.fileno() or -1, root.identity())
            root.close_file(directory.create_temporary(b".towpath.t"))
            directory.symlink(b"l", b"../../outside/canary")
            directory.mkdir(b"d")
            with pytest.raises(LeavesCollection):
                directory.stat(b"l") if len(directory.path) < 2 else root.stat((b"out", b"x"))
    grounds.check()


def test_hostile_names_one_by_one(grounds: Grounds) -> None:
    """Each name as a single component in every operation; 256 bytes and more are for the system to refuse."""
    hostile = [piece.encode("utf-8", "surrogatepass") for piece in PIECES]
    hostile += [bytes([number]) for number in range(256)] + [b"\xff" * 255, b"y" * 5000, b"../outside/canary"]
    refused = accepted = 0
    with open_root(str(grounds.inside)) as root, root.open_directory(()) as top:
        for name in hostile:
            try:
                root.close_file(top.create_temporary(name))
            except OSError:
                refused += 1
            else:
                accepted += 1
                node = top.lstat(name)
                assert node.kind == "file"
                top.rename(name, b"plain")
                top.rename(b"plain", name)
                assert [entry.name for entry in top.scan(reserved=True)] == [name]
                assert parse_path_untrusted("/" + escape(name)) == (name,) or name == b"~"
                top.unlink(name)
        assert list(top.scan(reserved=True)) == []
    assert refused >= 8
    assert accepted >= 260
    print(f"names: {len(hostile)}, refused {refused}, accepted and below the root {accepted}")
    grounds.check()


# --- links swapped in under our hands -----------------------------------------------------------------------


def contend(
    attacker: Attacker,
    attempt: Callable[[int], None],
    *,
    awaited: tuple[str, ...] = ("done", "LeavesCollection"),
    least: int = 3000,
    most: float = 20.0,
) -> Counter[str]:
    """Repeat an operation under attack, ``least`` times, until the attacker has come to something and all awaited
    outcomes have been seen."""
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + most
    number = 0
    with attacker:
        while time.monotonic() < end and (
            number < least or not attacker.swaps or not all(outcomes[kind] for kind in awaited)
        ):
            number += 1
            try:
                attempt(number)
                outcomes["done"] += 1
            except OSError as error:
                outcomes[type(error).__name__] += 1
    assert attacker.swaps > 0
    print(f"attempts {number}, swaps {attacker.swaps}: {dict(outcomes)}")
    return outcomes


@pytest.fixture()
def folder_race(grounds: Grounds) -> Iterator[tuple[Root, Attacker, Grounds]]:
    """victim is a folder and, half of the time, a link to the folder outside."""
    (grounds.inside / "victim").mkdir()
    (grounds.inside / "victim" / "f").write_bytes(b"inside")
    os.symlink(grounds.outside, grounds.inside / "evil")
    with open_root(str(grounds.inside)) as root:
        yield root, Attacker(grounds.inside / "victim", grounds.inside / "evil"), grounds


def read_all(root: Root, fd: int) -> bytes:
    buffer = bytearray(100)
    size = root.preadv(fd, [buffer], 0)
    root.close_file(fd)
    return bytes(buffer[:size])


def _scan(root: Root, directory: Directory, number: int) -> None:
    assert {node.name for node in directory.scan()} <= {b"f"}


def _stat(root: Root, directory: Directory, number: int) -> None:
    assert directory.stat(b"f").size == len(b"inside")


def _read(root: Root, directory: Directory, number: int) -> None:
    assert read_all(root, directory.open_read(b"f", follow=True)) == b"inside"


def _publish(root: Root, directory: Directory, number: int) -> None:
    fd = directory.create_temporary(b".towpath.%d" % number)
    root.pwrite(fd, b"inside", 0)
    root.close_file(fd)
    directory.rename(b".towpath.%d" % number, b"f")


def _make(root: Root, directory: Directory, number: int) -> None:
    directory.mkdir(b".towpath.d")
    directory.rmdir(b".towpath.d")


def _link(root: Root, directory: Directory, number: int) -> None:
    directory.symlink(b".towpath.l", b"f")
    directory.unlink(b".towpath.l")


def _metadata(root: Root, directory: Directory, number: int) -> None:
    directory.set_mode(b"f", 0o600)
    directory.set_times(b"f", number, follow=True)
    directory.sync()


@pytest.mark.parametrize("operation", [_scan, _stat, _read, _publish, _make, _link, _metadata])
def test_a_folder_swapped_for_a_link(
    folder_race: tuple[Root, Attacker, Grounds], operation: Callable[[Root, Directory, int], None]
) -> None:
    root, attacker, grounds = folder_race

    def attempt(number: int) -> None:
        with root.open_directory((b"victim",)) as directory:
            operation(root, directory, number)

    outcomes = contend(attacker, attempt)
    assert outcomes["done"] > 0
    assert outcomes["LeavesCollection"] > 0
    grounds.check()


def test_making_folders_through_a_swapped_link(folder_race: tuple[Root, Attacker, Grounds]) -> None:
    root, attacker, grounds = folder_race

    def attempt(number: int) -> None:
        with root.make_directories((b"victim", b"%d" % number, b"x"), durable=False) as directory:
            assert is_below(directory.fileno() or -1, root.identity())

    outcomes = contend(attacker, attempt)
    assert outcomes["done"] > 0
    assert outcomes["LeavesCollection"] > 0
    grounds.check()


def test_plain_paths_lose_this_race(folder_race: tuple[Root, Attacker, Grounds]) -> None:
    """The attack is real: checking first and opening the same path afterwards is fooled by it."""
    _, attacker, grounds = folder_race
    victim = grounds.inside / "victim"

    def attempt(number: int) -> None:
        if not victim.is_symlink() and (victim / "f").read_bytes() == SECRET:
            raise InterruptedError

    outcomes = contend(attacker, attempt, awaited=("InterruptedError",), least=0)
    assert outcomes["InterruptedError"] > 0


@pytest.fixture()
def file_race(grounds: Grounds) -> Iterator[tuple[Root, Directory, Attacker, Grounds]]:
    """victim is a file and, half of the time, a link to a file outside."""
    (grounds.inside / "victim").write_bytes(b"inside")
    os.symlink(grounds.outside / "canary", grounds.inside / "evil")
    with open_root(str(grounds.inside)) as root, root.open_directory(()) as top:
        yield root, top, Attacker(grounds.inside / "victim", grounds.inside / "evil"), grounds


def test_a_file_swapped_for_a_link(file_race: tuple[Root, Directory, Attacker, Grounds]) -> None:
    root, top, attacker, grounds = file_race

    def attempt(number: int) -> None:
        step = number % 6
        if step == 0:
            assert read_all(root, top.open_read(b"victim")) == b"inside"
        elif step == 1:
            assert read_all(root, top.open_read(b"victim", follow=True)) == b"inside"
        elif step == 2:
            fd = top.open_temporary(b"victim")
            root.pwrite(fd, b"inside", 0)
            root.close_file(fd)
        elif step == 3:
            top.set_mode(b"victim", 0o600 + number % 2)
        elif step == 4:
            top.set_times(b"victim", number, follow=True)
        else:
            assert top.stat(b"victim").size == len(b"inside")

    outcomes = contend(attacker, attempt, least=3000)
    assert outcomes["done"] > 0
    assert outcomes["LeavesCollection"] > 0
    grounds.check()


def test_renaming_and_removing_a_swapped_name(file_race: tuple[Root, Directory, Attacker, Grounds]) -> None:
    root, top, attacker, grounds = file_race

    def attempt(number: int) -> None:
        root.close_file(top.create_temporary(b".towpath.t"))
        try:
            top.rename(b".towpath.t", b"victim")
        finally:
            with contextlib.suppress(FileNotFoundError):
                top.unlink(b".towpath.t")
        if number % 2:
            top.unlink(b"evil")
            top.symlink(b"evil", os.fsencode(grounds.outside / "canary"))

    outcomes = contend(attacker, attempt, awaited=("done",), least=1000)
    assert outcomes["done"] > 0
    grounds.check()


def test_a_folder_moved_out_while_it_is_open(grounds: Grounds) -> None:
    """`..` in a link counts from where the folder was, never from where somebody carried it."""
    inner = grounds.inside / "a" / "b"
    inner.mkdir(parents=True)
    os.symlink("../canary", inner / "up")
    os.symlink("..", inner / "parent")
    with open_root(str(grounds.inside)) as root, root.open_directory((b"a", b"b")) as directory:
        os.rename(inner, grounds.outside / "b")
        for call in (
            lambda: directory.stat(b"up"),
            lambda: directory.open_read(b"up", follow=True),
            lambda: directory.set_times(b"up", 0, follow=True),
            lambda: directory.open_directory(b"parent", follow=True),
        ):
            with pytest.raises(FileNotFoundError):
                call()
        inner.mkdir()
        with directory.open_directory(b"parent", follow=True) as parent:
            assert is_below(parent.fileno() or -1, root.identity())


def test_a_maze_of_links_ends(grounds: Grounds) -> None:
    """Links that multiply at every turn: bounded work, one error."""
    for number in range(30):
        os.symlink(f"{number + 1}/../{number + 1}", grounds.inside / str(number))
    (grounds.inside / "30").mkdir()
    (grounds.inside / "d").mkdir()
    os.symlink("d/../" * 800, grounds.inside / "long")
    started = time.monotonic()
    with open_root(str(grounds.inside)) as root:
        with pytest.raises(OSError) as caught:
            root.open_directory((b"0",))
        assert caught.value.errno == errno.ELOOP
        with root.open_directory((b"long",)) as directory:
            assert directory.path == ()
    assert time.monotonic() - started < 20


def test_no_descriptor_is_left_behind(grounds: Grounds) -> None:
    (grounds.inside / "d").mkdir()
    (grounds.inside / "f").write_bytes(b"x")
    os.mkfifo(grounds.inside / "pipe")
    for name, target in (("out", "/etc"), ("loop", "loop"), ("lf", "f"), ("ld", "d"), ("up", "..")):
        os.symlink(target, grounds.inside / name)
    with open_root(str(grounds.inside)) as root:
        before = len(os.listdir("/proc/self/fd"))
        with root.open_directory(()) as top:
            for name in (b"d", b"f", b"out", b"loop", b"lf", b"ld", b"up", b"pipe", b"nothing", b"", b".."):
                for call in (
                    lambda name: root.open_directory((name,)).close(),
                    lambda name: root.make_directories((name, b"new")).close(),
                    lambda name: root.stat((name,)),
                    lambda name: root.open_parent((name, b"x"))[0].close(),
                    lambda name: os.close(top.open_read(name, follow=True)),
                    lambda name: os.close(top.open_temporary(name)),
                    lambda name: top.open_directory(name, follow=True).close(),
                    lambda name: top.set_times(name, 0, follow=True),
                    lambda name: top.set_mode(name, 0o700),
                    lambda name: next(top.scan()),
                ):
                    with contextlib.suppress(OSError):
                        call(name)
        assert len(os.listdir("/proc/self/fd")) == before

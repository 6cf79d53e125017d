"""Sources that change while they are read: noticed, read again, and told, in running transfers between real workers."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from agent.limits.pace import Pace
from agent.storage.base import Root
from agent.storage.faulty import Call
from agent.storage.node import version_of
from agent.storage.posix import open_root
from agent.transfer.books.manifest import SkippedRow, read_page
from agent.transfer.source import send, source_files
from agent.transfer.source.lane_queues import LaneRequest
from protocol import session
from protocol.control import TaskItem, TaskOptions
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path, skipped
from tests.agent.engine_world import World, world

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")

MIB = 1024 * 1024
WHOLE = [TaskItem(source_path="/", destination_path="/", recursive=True)]


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(os.urandom(1000))


def shrink(path: Path) -> None:
    size = path.stat().st_size
    if size < 1000:
        path.write_bytes(os.urandom(9000))
    else:
        os.truncate(path, size - 100)


def replace(path: Path) -> None:
    """Another file of the same size and time takes the name."""
    status = path.stat()
    # Beside the collection: in it, it would be a file of its own for a moment.
    other = path.parent.parent / f"{path.name}.new"
    other.write_bytes(os.urandom(status.st_size))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


def overwrite_keeping_time(path: Path) -> None:
    """Other content under the old size and time of modification; only the kernel's time of change tells."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        file.write(os.urandom(1000))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = {"grown": grow, "shrunk": shrink, "replaced": replace, "same-mtime": overwrite_keeping_time}


def digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes()).digest()


@contextmanager
def changing(path: Path, change: Callable[[Path], None], until: Callable[[], bool]) -> Iterator[set[bytes]]:
    """Change a file again and again, from a thread, until somebody noticed. Digests of what it was meanwhile."""
    stop = threading.Event()
    versions = {digest(path)}

    def work() -> None:
        while not stop.wait(0.005) and not until():
            change(path)
            versions.add(digest(path))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield versions
    finally:
        stop.set()
        thread.join()


def told_of(made: World, name: str) -> list[str]:
    return [event.details for event in made.events if event.code == "FILE_CHANGED" and name in event.details]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 24 * MIB) for name in CHANGES),
        ("same-mtime", 3000),
        *(pytest.param(name, 3000, marks=pytest.mark.soak) for name in ("grown", "shrunk", "replaced")),
    ],
)
async def test_a_source_that_changes_is_read_again_and_told(tmp_path: Path, name: str, size: int) -> None:
    async with world(tmp_path) as made:
        path = made.alpha.root / name
        for number in range(30):
            (made.alpha.root / f"bystander-{number}").write_bytes(os.urandom(50_000))
        path.write_bytes(os.urandom(size))
        # Until the task has seen it: it may be listed and read between two changes only once.
        with changing(path, CHANGES[name], lambda: bool(told_of(made, name))) as versions:
            task = await made.submit(WHOLE)
            with trio.fail_after(60):
                while not told_of(made, name):
                    assert made.beta.service is not None
                    if made.beta.service.get_task(task).state == "SUCCEEDED":
                        # Read between two changes by luck: once more.
                        task = await made.submit(WHOLE)
                    await trio.sleep(0.005)
        observed = await made.wait(task)
        if observed.state == "FAILED":
            # On a slow machine the file may have changed for every try before the first was told of.
            assert len(told_of(made, name)) == 5
            observed = await made.wait(await made.submit(WHOLE))
        assert observed.state == "SUCCEEDED", observed
        # One of its versions, never a mixed one. The last change may have begun before anything was told, and have
        # ended after the file was read again.
        assert digest(made.beta.root / name) in versions
        last = await made.wait(await made.submit(WHOLE))
        assert last.state == "SUCCEEDED", last
        assert contents(made.beta.root) == contents(made.alpha.root)
        assert observed.counters.failed == 0
        assert all("(source owner)" in details for details in told_of(made, name))
        print(f"{name}, {size} bytes: noticed {len(told_of(made, name))} times")


@pytest.mark.soak
async def test_a_source_that_never_rests_is_listed_among_the_skipped_errors(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        path = made.alpha.root / "restless"
        path.write_bytes(os.urandom(24 * MIB))
        (made.alpha.root / "calm").write_bytes(b"calm")
        lucky, told = [], 0
        with changing(path, overwrite_keeping_time, lambda: False) as versions:
            while True:
                task = await made.submit(WHOLE)
                observed = await made.wait(task, seconds=120)
                if observed.state != "SUCCEEDED" or len(lucky) == 10:
                    break
                # On a slow machine it may be read between two changes: then it is one version.
                lucky.append(digest(made.beta.root / "restless"))
                (made.beta.root / "restless").unlink()
                told = len(told_of(made, "restless"))
        assert versions.issuperset(lucky)
        assert (observed.state, observed.error_code, observed.counters.failed) == ("FAILED", "ITEMS_FAILED", 1)
        assert contents(made.beta.root) == {"calm": b"calm"}
        assert made.beta.service is not None
        (row,) = (await made.beta.service.skipped(task, None, 10)).rows
        assert (row["source_path"], row["error_code"]) == ("/restless", "FILE_CHANGED")
        assert len(told_of(made, "restless")) - told == 5


async def test_what_never_rests_is_listed_with_its_reason(quick_path: Path) -> None:
    path = quick_path / "source" / "restless"

    def plan(call: Call) -> int | None:
        if call.operation == "preadv":
            overwrite_keeping_time(path)
        return None

    engine = Engine(quick_path, source_plan=plan)
    path.write_bytes(os.urandom(3 * MIB))
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    (row,) = read_page(engine.state / "skipped.manifest", SkippedRow, None, 10, complete=True).rows
    assert (row.source, row.code) == (b"restless", "FILE_CHANGED")
    assert "changed at the source while it was read" in row.details
    assert engine.codes().count("FILE_CHANGED") == 5
    assert contents(engine.destination) == {}
    assert engine.temporaries() == []


@pytest.mark.parametrize("skip", [False, True])
async def test_a_source_that_goes_away_while_it_is_read(quick_path: Path, *, skip: bool) -> None:
    path = quick_path / "source" / "file"

    def plan(call: Call) -> int | None:
        if call.operation == "preadv" and call.nth == 2:
            path.rename(path.with_name("elsewhere"))
            path.with_name("elsewhere").unlink()
        return None

    options = msgspec.structs.replace(CHECKED, skip_source_errors=skip)
    engine = Engine(quick_path, options, source_plan=plan)
    path.write_bytes(os.urandom(5 * MIB))
    observed = await engine.run()
    (row,) = read_page(engine.state / "skipped.manifest", SkippedRow, None, 10, complete=True).rows
    assert (row.source, row.code) == (b"file", "FILE_NOT_FOUND")
    assert contents(engine.destination) == {}
    assert engine.temporaries() == []
    if skip:
        assert (observed.state, observed.counters.skipped_errors) == ("SUCCEEDED", 1)
    else:
        assert (observed.state, observed.counters.failed) == ("FAILED", 1)


async def test_a_folder_that_grows_while_it_is_listed_gives_what_was_listed(quick_path: Path) -> None:
    def plan(call: Call) -> int | None:
        if call.operation in ("preadv", "fstat", "open_read_status"):
            (quick_path / "source" / f"late-{call.number}").write_bytes(b"late")
        return None

    engine = Engine(quick_path, TaskOptions(verify_checksum=True), source_plan=plan)
    for number in range(50):
        (engine.source / f"early-{number}").write_bytes(b"early %d" % number)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    there, source = contents(engine.destination), contents(engine.source)
    assert {name for name in there if name.startswith("early")} == {f"early-{number}" for number in range(50)}
    assert all(source[name] == content for name, content in there.items())


@pytest.mark.parametrize(
    ("age", "pause"), [(0, 0.02), (5_000_000, 0.015), (20_000_000, 0.0), (10**12, 0.0), (-(10**9), 0.0)]
)
def test_a_file_that_was_changed_a_moment_ago_is_let_rest(age: int, pause: float) -> None:
    """Clocks of file systems tick: a second change within the tick of the first would leave no trace."""
    now = 1_700_000_000 * 10**9
    assert send.rest(now - age, now) == pytest.approx(pause)


async def test_fresh_files_are_read_after_their_tick(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(send, "CLOCK_TICK", 10**15)
    monkeypatch.setattr("agent.transfer.source.send.time.sleep", rests.append)
    engine = Engine(quick_path)
    (engine.source / "small").write_bytes(b"small")
    (engine.source / "large").write_bytes(bytes(3 * MIB))
    assert (await engine.run()).state == "SUCCEEDED"
    assert len(rests) == 2


@pytest.mark.parametrize("asks", ["holes", "blocks", "digest"])
async def test_what_is_asked_of_fresh_files_is_looked_at_after_their_tick(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    """What is a hole, or the same in the old file, is put together with blocks that are read later: a change between
    the two has to show."""
    rests: list[float] = []
    monkeypatch.setattr(send, "CLOCK_TICK", 10**15)
    monkeypatch.setattr("agent.transfer.source.send.time.sleep", rests.append)
    engine = Engine(quick_path, TaskOptions(verify_checksum=True, sync_level=3 if asks == "digest" else None))
    large = engine.source / "large"
    with large.open("wb") as file:
        file.truncate(65 * MIB)
        file.write(b"begin")
    if asks != "holes":
        large.write_bytes(os.urandom(17 * MIB))
        (engine.destination / "large").write_bytes(large.read_bytes())
    seen: list[str] = []
    for name in ("data_extents", "block_digests", "file_digest"):
        real = getattr(source_files, name)

        def looking(*arguments: Any, real: Any = real, name: str = name) -> Any:
            seen.append(name)
            assert rests, f"{name} before the file had rested"
            return real(*arguments)

        monkeypatch.setattr(source_files, name, looking)
    assert (await engine.run()).state == "SUCCEEDED"
    assert {"holes": "data_extents", "blocks": "block_digests", "digest": "file_digest"}[asks] in seen


def test_a_file_that_is_open_already_is_let_rest_for_each_version(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(send, "CLOCK_TICK", 10**15)
    monkeypatch.setattr("agent.transfer.source.send.time.sleep", rests.append)
    path = quick_path / "file"
    with open_root(str(quick_path)) as root:
        sender = send.LaneSender(_Sink(), lambda *_: None, Pace())  # type: ignore[arg-type]
        sender._root = root
        for content in (b"A", b"B"):
            path.write_bytes(content * MIB)
            version = version_of(path.stat())
            request = session.ReadRange(1, 0, b"file", version, 0, MIB, MIB)
            work = LaneRequest(request, (b"file",), ())
            sender._serve(work)
        sender._close()
    assert len(rests) == 2


class _Sink:
    """Takes what a lane sends."""

    def sendall(self, data: bytes | memoryview) -> None:
        return

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        raise OSError(errno.ENOPROTOOPT, "no TCP socket")


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EINVAL])
async def test_a_link_that_is_gone_or_something_else_when_it_is_read_fails_nothing(quick_path: Path, code: int) -> None:
    """Editors make such links for a moment, to say who is at work."""
    faults: list[Call] = []

    def plan(call: Call) -> int | None:
        if call.operation != "readlink" or faults:
            return None
        faults.append(call)
        (engine.source / "link").unlink()
        if code == errno.EINVAL:
            (engine.source / "link").write_bytes(b"a file by now")
        return code

    engine = Engine(quick_path, source_plan=plan)
    (engine.source / "file").write_bytes(b"content")
    (engine.source / "link").symlink_to("nobody@somewhere")
    observed = await engine.run()
    assert faults
    if code == errno.ENOENT:
        assert observed.state == "SUCCEEDED", (observed, skipped(engine))
        assert contents(engine.destination) == contents(engine.source)
    else:
        # It is named as what the source has replaced.
        assert skipped(engine) == {"link": "FILE_CHANGED"}


@pytest.mark.skipif(not Path("/proc/sys/kernel/ostype").exists(), reason="needs files that say that they are empty")
async def test_files_that_are_longer_than_they_say_do_not_arrive_as_empty_ones(quick_path: Path) -> None:
    """So are files of /proc, and documents of an online service that a program mounts; they came as empty files."""
    engine = Engine(quick_path, items=[TaskItem(source_path="/ostype", destination_path="/ostype")])
    engine.source = Path("/proc/sys/kernel")
    observed = await engine.run()
    assert observed.state == "FAILED", observed
    assert skipped(engine) == {"ostype": "FILE_CHANGED"}
    assert contents(engine.destination) == {}
    with open_root(str(engine.source)) as root, root.open_directory(()) as folder:
        assert root.read_whole(folder, b"ostype", memoryview(bytearray(0)))[0] == 1


def test_a_file_read_whole_tells_its_length_and_whether_there_is_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "empty").write_bytes(b"")
    with open_root(str(tmp_path)) as root, root.open_directory(()) as folder:
        for name, room, found in ((b"file", 4, 5), (b"file", 5, 5), (b"file", 9, 5), (b"empty", 0, 0)):
            for read in (root.read_whole, partial(Root.read_whole, root)):
                into = memoryview(bytearray(room))
                assert read(folder, name, into)[0] == found
                assert bytes(into) == b"12345"[:room].ljust(room, b"\0")

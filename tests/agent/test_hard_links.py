"""Several names of one file, kept as such when a task asks for it: the content comes once, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
import time
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from agent.storage.faulty import Call
from agent.transfer.asking.budget import UNSETTLED_BYTES
from agent.transfer.basis.jobs import HardLinkWanted, LinkWanted
from agent.transfer.books.journal import Journal
from agent.transfer.planning import directories, hard_links
from protocol.control import TaskItem
from tests.agent.engine_inside import CHECKED, WHOLE, Crashed, Engine, contents, quick_path
from tests.agent.engine_world import world

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")

MIB = 1024 * 1024
KEPT = msgspec.structs.replace(CHECKED, preserve_hard_links=True)
FILES, NAMES = 6, 4


def scene(engine: Engine) -> None:
    """Files with several names over several folders: small, empty and large ones, and some with one name."""
    chosen = random.Random(7)
    folders = [engine.source / name for name in (".", "a", "a/b", "c")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        first = folders[number % 4] / f"first-{number}"
        first.write_bytes(chosen.randbytes((0, 10, 5000, 2 * MIB + 1)[number % 4]))
        first.chmod(0o444 if number % 2 else 0o640)
        for name in range(1, NAMES):
            os.link(first, chosen.choice(folders) / f"name-{number}-{name}")
    (engine.source / "alone").write_bytes(b"alone")


def together(root: Path) -> set[frozenset[str]]:
    """Which names are one file."""
    files = defaultdict(set)
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".towpath."):
            files[path.stat().st_ino].add(str(path.relative_to(root)))
    return {frozenset(names) for names in files.values()}


def check(engine: Engine) -> None:
    assert contents(engine.destination) == contents(engine.source)
    assert together(engine.destination) == together(engine.source)
    for path in engine.source.rglob("*"):
        copy = engine.destination / path.relative_to(engine.source)
        assert (copy.stat().st_mode, copy.stat().st_mtime_ns) == (path.stat().st_mode, path.stat().st_mtime_ns)
    assert not engine.temporaries()


@pytest.mark.parametrize("by_items", [False, True])
async def test_names_of_one_file_stay_names_of_one_file(quick_path: Path, *, by_items: bool) -> None:
    engine = Engine(quick_path, KEPT)
    scene(engine)
    if by_items:
        names = [str(path.relative_to(engine.source)) for path in engine.source.rglob("*") if path.is_file()]
        engine.items = [TaskItem(source_path=f"/{name}", destination_path=f"/{name}") for name in sorted(names)]
        for name in ("a/b", "c"):
            (engine.destination / name).mkdir(parents=True)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert together(engine.destination) == together(engine.source)
    counters = observed.counters
    assert (counters.files, counters.files_transferred) == (FILES * NAMES + 1, FILES * NAMES + 1)
    assert (counters.hard_links, counters.hard_links_kept) == (FILES * NAMES, FILES * (NAMES - 1))
    once = sum(next(iter(engine.source / name for name in names)).stat().st_size for names in together(engine.source))
    assert (counters.bytes_total, counters.bytes_transferred, counters.bytes_sent_again) == (once, once, 0)
    print(f"files: {FILES + 1}, names: {counters.files}, bytes sent: {once}")


@pytest.mark.parametrize("level", [None, 0, 1, 2, 3])
async def test_what_is_there_already_is_joined_as_the_sync_level_allows(quick_path: Path, level: int | None) -> None:
    """A second run changes nothing; names that were copies become one file where the content is known to be equal."""
    engine = Engine(quick_path, msgspec.structs.replace(KEPT, sync_level=level))
    (engine.source / "f").mkdir()
    for name in ("f/1", "f/2", "f/3"):
        if name == "f/1":
            (engine.source / name).write_bytes(b"content")
        else:
            os.link(engine.source / "f/1", engine.source / name)
    (engine.destination / "f").mkdir()
    time = (engine.source / "f/1").stat().st_mtime_ns
    for name in ("f/1", "f/2"):
        # As a task without hard links would have left it.
        (engine.destination / name).write_bytes(b"content")
        os.utime(engine.destination / name, ns=(time, time))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    found = together(engine.destination)
    if level in (0, 1):
        # Nothing says that these have the source's content: they are left alone, and no further name is made of them.
        assert len(found) == 3
    else:
        assert found == {frozenset({"f/1", "f/2", "f/3"})}
        again = Engine(quick_path, msgspec.structs.replace(KEPT, sync_level=3))
        again.state = quick_path / "again"
        inode = (engine.destination / "f/1").stat().st_ino
        observed = await again.run()
        assert observed.state == "SUCCEEDED", observed
        assert together(again.destination) == found
        assert (again.destination / "f/1").stat().st_ino == inode
        assert observed.counters.hard_links_kept == 2


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_a_file_of_other_content_gives_no_name_away(quick_path: Path, level: int) -> None:
    """Left alone by a sync level although it differs, it must not become the content of a name that is missing."""
    # Whichever of them a folder lists first.
    for kept, missing in (("1", "2"), ("2", "1")):
        engine = Engine(quick_path / kept, msgspec.structs.replace(KEPT, sync_level=level))
        (engine.source / "1").write_bytes(b"content")
        os.link(engine.source / "1", engine.source / "2")
        (engine.destination / kept).write_bytes(b"another")
        time = (engine.source / "1").stat().st_mtime_ns // 10**9 * 10**9 + 1
        os.utime(engine.destination / kept, ns=(time, time))
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert (engine.destination / kept).read_bytes() == b"another"
        assert (engine.destination / missing).read_bytes() == b"content"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV, errno.EIO])
async def test_where_no_further_name_can_be_made_files_are_copied(quick_path: Path, code: int) -> None:
    engine = Engine(quick_path, KEPT, plan=lambda call: code if call.operation == "link" else None)
    scene(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert all(len(names) == 1 for names in together(engine.destination))
    assert (observed.counters.hard_links, observed.counters.hard_links_kept) == (FILES * NAMES, 0)
    assert observed.counters.bytes_total == observed.counters.bytes_transferred
    assert engine.codes().count(hard_links.CODE) == 1
    assert not engine.temporaries()


async def test_too_many_names_begin_a_second_file(quick_path: Path) -> None:
    """As on a file system with a bound: every third link fails."""
    engine = Engine(
        quick_path, KEPT, plan=lambda call: errno.EMLINK if call.operation == "link" and not call.nth % 3 else None
    )
    for number in range(12):
        path = engine.source / f"{number:02}"
        path.write_bytes(b"content") if not number else os.link(engine.source / "00", path)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert 2 <= len(together(engine.destination)) <= 5


async def test_what_somebody_puts_in_the_place_of_the_first_name_is_never_linked(quick_path: Path) -> None:
    """A secret of another folder, a link to it, another file: whatever the first name leads to by then."""
    outside = quick_path / "outside"
    outside.write_bytes(b"secret")
    for number, swap in enumerate(("other", "link", "hard link", "gone", "folder", "written")):
        base = quick_path / f"try-{number}"

        def plan(call: Call, swap: str = swap, base: Path = base) -> int | None:
            if call.operation == "link" and call.nth == 1:
                for name in ("1", "2"):
                    path = base / "destination" / name
                    if not path.exists():
                        continue
                    if swap == "written":
                        path.write_bytes(b"written")
                        continue
                    path.unlink()
                    if swap == "other":
                        path.write_bytes(b"other")
                    elif swap == "link":
                        path.symlink_to(outside)
                    elif swap == "hard link":
                        os.link(outside, path)
                    elif swap == "folder":
                        path.mkdir()
            return None

        engine = Engine(base, KEPT, plan=plan)
        (engine.source / "1").write_bytes(b"content")
        os.link(engine.source / "1", engine.source / "2")
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", (swap, observed)
        assert outside.read_bytes() == b"secret"
        secrets = [path for path in engine.destination.iterdir() if path.lstat().st_ino == outside.stat().st_ino]
        assert len(secrets) == (swap == "hard link")
        names = [path for path in (engine.destination / "1", engine.destination / "2") if path.is_file()]
        assert b"content" in [path.read_bytes() for path in names]
        assert engine.codes().count(hard_links.CODE) == 1
        assert not engine.temporaries()


async def test_a_file_that_changes_between_its_names_is_never_a_mixture(quick_path: Path) -> None:
    engine = Engine(quick_path, KEPT)
    for folder in ("a", "b"):
        (engine.source / folder).mkdir()
    (engine.source / "a/1").write_bytes(b"old")
    os.link(engine.source / "a/1", engine.source / "b/2")
    changed = []

    def plan(call: Call) -> int | None:
        if call.operation == "fstat" and not changed:
            changed.append(call)
            (engine.source / "a/1").write_bytes(b"newer")
        return None

    engine.source_plan = plan
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


async def test_the_first_name_fails_and_the_next_one_leads(quick_path: Path) -> None:
    """A name that the destination cannot have is that name's trouble alone."""

    def plan(call: Call) -> int | None:
        return errno.EILSEQ if call.operation == "rename" and call.name == b"1" else None

    engine = Engine(quick_path, KEPT, plan=plan)
    (engine.source / "1").write_bytes(b"content")
    for name in ("2", "3", "4"):
        os.link(engine.source / "1", engine.source / name)
    observed = await engine.run()
    assert observed.state == "FAILED"
    assert observed.counters.failed == 1
    assert together(engine.destination) == {frozenset({"2", "3", "4"})}
    assert not engine.temporaries()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
async def test_a_crash_at_any_call_keeps_names_together(quick_path: Path, every: int) -> None:
    whole = Engine(quick_path / "whole", KEPT)
    scene(whole)
    await whole.run()
    links = [call.number for call in whole.calls if call.operation == "link"]
    numbers = sorted(
        {call.number for call in whole.calls[::7]} | {number + step for number in links for step in (0, 2, 3)}
    )
    crashes = 0
    for number in numbers[::every]:

        def plan(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        engine = Engine(quick_path / f"crash-{number}", KEPT, plan=plan)
        scene(engine)
        try:
            await engine.run()
        except Crashed:
            crashes += 1
            engine = engine.revived()
            observed = await engine.run()
            assert observed.state == "SUCCEEDED", observed
            assert observed.counters.hard_links_kept == FILES * (NAMES - 1)
            assert observed.counters.bytes_transferred <= observed.counters.bytes_total
        check(engine)
    assert crashes
    print(f"crashes survived: {crashes}")


async def test_only_what_is_on_its_way_is_remembered(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many names wait for one file that comes slowly: planners wait with them. What is done is in the journal alone."""
    monkeypatch.setattr(hard_links, "MOST_WAITING", 20)
    engine = Engine(quick_path, KEPT)
    made: list[hard_links.HardLinks] = []
    begin = hard_links.HardLinks.__init__
    most = [0]
    room = hard_links.HardLinks.room

    def noted(self: hard_links.HardLinks, *arguments: object) -> None:
        begin(self, *arguments)  # type: ignore[arg-type]
        made.append(self)

    async def looked(self: hard_links.HardLinks) -> None:
        await room(self)
        most[0] = max(most[0], self._count)

    monkeypatch.setattr(hard_links.HardLinks, "__init__", noted)
    monkeypatch.setattr(hard_links.HardLinks, "room", looked)
    for folder in range(10):
        (engine.source / str(folder)).mkdir()
    (engine.source / "0" / "large").write_bytes(bytes(MIB + 1) + b"x")
    for number in range(300):
        os.link(engine.source / "0" / "large", engine.source / str(number % 10) / f"{number}")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert together(engine.destination) == together(engine.source)
    assert observed.counters.bytes_transferred == MIB + 2
    (links,) = made
    assert (links._count, links._waiting, links._leaders) == (0, {}, {})
    assert most[0] <= 20
    with contextlib.closing(sqlite3.connect(engine.state / "journal.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM hard_links").fetchone() == (1,)


@pytest.mark.parametrize("kind", ["hard links", "symlinks"])
async def test_names_are_not_planned_far_ahead_of_their_making(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """However fast a source lists: what the settler has not made yet is bounded, over all folders and in each."""
    monkeypatch.setattr(hard_links, "MOST_WAITING", 20)
    monkeypatch.setattr(hard_links, "MOST_HANDED", 20)
    monkeypatch.setattr(directories, "LISTERS", 2)
    monkeypatch.setattr(directories, "charge", lambda _size: UNSETTLED_BYTES // 20)
    puts, made = [0], [0]
    most = [0]
    wanted, once = (HardLinkWanted, "link") if kind == "hard links" else (LinkWanted, "symlink")

    def counting(self: object, *arguments: object) -> None:
        begin(self, *arguments)  # type: ignore[arg-type]
        puts[0] += 1
        most[0] = max(most[0], puts[0] - made[0])

    def plan(call: Call) -> int | None:
        if call.operation == once:
            made[0] += 1
            # The first one takes so long that everything could be planned meanwhile.
            for _ in range(50 if made[0] == 1 else 0):
                if puts[0] >= 590:
                    break
                time.sleep(0.01)
        return None

    begin = wanted.__init__
    monkeypatch.setattr(wanted, "__init__", counting)
    engine = Engine(quick_path, KEPT, plan=plan)
    for folder in range(60):
        (engine.source / f"{folder:02}").mkdir()
        for number in range(10):
            path = engine.source / f"{folder:02}" / f"{number}"
            if kind == "symlinks":
                path.symlink_to("nowhere")
            elif folder:
                path.hardlink_to(engine.source / "00" / f"{number}")
            else:
                path.write_bytes(b"content")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert puts[0] >= 590
    # What each lister has just planned besides, and what is being made.
    assert most[0] <= 20 + 20 + 4 * 10
    print(f"{kind}: at most {most[0]} of {puts[0]} planned and not made")


def test_a_source_with_inodes_beyond_what_sqlite_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    assert journal.hard_links([(2**64 - 1, 2**64 - 1)]) == {}
    journal.close()


async def test_links_and_attributes_between_real_workers(tmp_path: Path) -> None:
    options = msgspec.structs.replace(KEPT, preserve_xattrs=True)
    async with world(tmp_path) as made:
        (made.alpha.root / "a").mkdir()
        (made.alpha.root / "a" / "one").write_bytes(os.urandom(MIB + 7))
        (made.alpha.root / "two").hardlink_to(made.alpha.root / "a" / "one")
        try:
            os.setxattr(made.alpha.root / "two", "user.colour", b"green")
        except OSError as error:
            pytest.skip(f"this file system keeps no extended attributes: {error}")
        observed = await made.wait(await made.submit(WHOLE, options))
        assert observed.state == "SUCCEEDED", observed
        assert contents(made.beta.root) == contents(made.alpha.root)
        assert together(made.beta.root) == {frozenset({"a/one", "two"})}
        assert os.getxattr(made.beta.root / "a" / "one", "user.colour") == b"green"
        assert (observed.counters.hard_links_kept, observed.counters.bytes_transferred) == (1, MIB + 7)

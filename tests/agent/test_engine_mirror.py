"""Mirrors: what is deleted at the destination, when, and what refuses to be."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from agent.storage.base import Root
from agent.storage.faulty import Call, fail_nth, no_faults
from agent.storage.hiding import offered
from agent.storage.posix import open_root
from agent.transfer.basis.patience import Patience
from agent.transfer.books.journal import Journal
from agent.transfer.deleting.mirror import Mirror
from agent.transfer.deleting.remove import MAX_OPEN
from agent.transfer.planning.plan import DirectoryPlanner
from agent.transfer.planning.second_look import LOOKS
from protocol.control import FilterRule, TaskItem, TaskOptions
from protocol.session import FILE, Row
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path

__all__ = ["quick_path"]

MIRROR = TaskOptions(delete_destination_extra=True, sync_level=1)


def lay_out(engine: Engine) -> None:
    for place, names in (
        (engine.source, ("a/one", "a/two", "b/three")),
        (engine.destination, ("a/one", "a/old", "x/y/z")),
    ):
        for name in names:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"content")
    (engine.destination / "link").symlink_to("a")


async def test_a_mirror_ends_equal(quick_path: Path) -> None:
    engine = Engine(quick_path, MIRROR)
    lay_out(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    # a/old, x, x/y, x/y/z, link
    assert observed.counters.deleted == 5


async def test_what_the_rules_leave_out_is_not_deleted(quick_path: Path) -> None:
    rules = [FilterRule(method="exclude", name="x", type="dir")]
    engine = Engine(quick_path, TaskOptions(delete_destination_extra=True, sync_level=1, filter_rules=rules))
    lay_out(engine)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "x" / "y" / "z").exists()
    assert not (engine.destination / "a" / "old").exists()


async def test_nothing_is_deleted_before_everything_has_arrived(quick_path: Path) -> None:
    removals = ("unlink", "rmdir")
    engine = Engine(quick_path, MIRROR)
    lay_out(engine)
    await engine.run()
    order = [call.operation for call in engine.calls if call.operation in (*removals, "rename")]
    assert order.index("unlink") > len(order) - 1 - order[::-1].index("rename")


async def test_a_mirror_of_an_emptied_source_is_refused(quick_path: Path) -> None:
    """The source's disk is not mounted, say: its folder is empty, and the destination holds years of work."""
    engine = Engine(quick_path, MIRROR)
    for number in range(1500):
        (engine.destination / str(number)).write_bytes(b"years of work")
    (engine.source / "new").write_bytes(b"new")
    observed = await engine.run()
    assert (observed.state, observed.error_code, observed.who) == ("FAILED", "DELETE_REFUSED", "you")
    assert len(list(engine.destination.iterdir())) == 1501
    assert observed.counters.deleted == 0
    # Whoever means it says so.
    confirmed = Engine(
        quick_path / "again", TaskOptions(delete_destination_extra=True, delete_destination_extra_limit=1500)
    )
    confirmed.source, confirmed.destination = engine.source, engine.destination
    observed = await confirmed.run()
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 1500)
    print("files saved from an empty source: 1500")


@pytest.mark.parametrize(("limit", "state"), [(0, "FAILED"), (4, "FAILED"), (5, "SUCCEEDED")])
async def test_a_limit_counts_everything_below(quick_path: Path, limit: int, state: str) -> None:
    options = TaskOptions(delete_destination_extra=True, sync_level=1, delete_destination_extra_limit=limit)
    engine = Engine(quick_path, options)
    lay_out(engine)
    observed = await engine.run()
    assert observed.state == state
    assert (engine.destination / "x" / "y" / "z").exists() is (state == "FAILED")


@pytest.mark.parametrize(("deep", "closed"), [(100, False), (1, True)])
async def test_a_limit_counts_what_lies_deep_and_beside_what_cannot_be_looked_into(
    quick_path: Path, *, deep: int, closed: bool
) -> None:
    """Neither was counted: a folder of whatever size that holds one of somebody else's was one entry, and went."""
    options = TaskOptions(delete_destination_extra=True, sync_level=1, delete_destination_extra_limit=deep + 4)
    engine = Engine(quick_path, options, plan=lambda call: errno.EACCES if closed and call.name == b"theirs" else None)
    lay_out(engine)
    (engine.source / "x").mkdir()
    (engine.source / "x" / "y").mkdir()
    bottom = engine.destination.joinpath(*["extra"] * deep)
    for name in ("one", "two", "closed/theirs", "three"):
        (bottom / name).parent.mkdir(parents=True, exist_ok=True)
        (bottom / name).write_bytes(b"content")
    before = contents(engine.destination)
    observed = await engine.run()
    assert (observed.state, observed.error_code) == ("FAILED", "DELETE_REFUSED"), observed
    assert before.items() <= contents(engine.destination).items()


async def test_a_crash_at_every_other_call_of_a_mirror(quick_path: Path) -> None:
    plain = Engine(quick_path / "plain", MIRROR)
    lay_out(plain)
    await plain.run()
    crashes = 0
    for number in range(1, len(plain.calls) + 1, 2):

        def die(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        engine = Engine(quick_path / str(number), MIRROR, plan=die)
        lay_out(engine)
        try:
            await engine.run()
        except Crashed:
            crashes += 1
        after = engine.revived()
        observed = await after.run()
        assert observed.state == "SUCCEEDED", (number, observed)
        assert contents(engine.destination) == contents(engine.source), number
    assert crashes > 10
    print(f"crashes survived: {crashes}")


async def test_what_cannot_be_deleted_is_listed_and_the_rest_goes(quick_path: Path) -> None:
    engine = Engine(quick_path, MIRROR, plan=fail_nth(1, errno.EACCES, "unlink"))
    lay_out(engine)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    left = set(contents(engine.destination)) - set(contents(engine.source))
    assert len(left) == 1, left


async def test_a_source_that_gains_a_file_meanwhile_keeps_it(quick_path: Path) -> None:
    """Noted as extra in a run that died; there in the next one."""

    def die(call: Call) -> int | None:
        if call.operation == "unlink":
            raise Crashed
        return None

    engine = Engine(quick_path, MIRROR, plan=die)
    lay_out(engine)
    with pytest.raises(Crashed):
        await engine.run()
    os.truncate(engine.state / "journal.sqlite", 0)
    for suffix in ("-wal", "-shm"):
        (engine.state / f"journal.sqlite{suffix}").unlink(missing_ok=True)
    (engine.source / "a" / "old").write_bytes(b"content")
    observed = await engine.revived().run()
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "a" / "old").exists()


async def test_a_folder_that_may_not_be_looked_through_is_an_error_of_its_own(quick_path: Path) -> None:
    scans: list[Call] = []

    def plan(call: Call) -> int | None:
        if call.operation != "scan":
            return None
        scans.append(call)
        # The first look is at whether the folder is empty, the second for what is too much.
        return errno.EACCES if len(scans) == 2 else None

    engine = Engine(quick_path, MIRROR, plan=plan)
    (engine.source / "file").write_bytes(b"content")
    (engine.destination / "extra").write_bytes(b"extra")
    observed = await engine.run()
    assert len(scans) >= 2
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert "PERMISSION_DENIED" in engine.codes()
    assert contents(engine.destination) == {"file": b"content", "extra": b"extra"}


def _item(source: str, destination: str, *, recursive: bool | None = True) -> TaskItem:
    return TaskItem(source_path=source, destination_path=destination, recursive=recursive)


def _fill(place: Path, *names: str) -> None:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"content")


async def test_what_other_items_put_into_a_folder_is_not_deleted(quick_path: Path) -> None:
    items = [
        _item("/a", "/x"),
        _item("/b", "/x/sub"),
        _item("/c", "/x/deep/er"),
        _item("/file", "/x/file", recursive=None),
    ]
    for time in range(2):
        # The second time everything is there when it is looked for.
        engine = Engine(quick_path, MIRROR, items=items)
        engine.state = quick_path / f"state {time}"
        engine.state.mkdir()
        _fill(engine.source, "a/one", "b/two", "c/three", "file")
        _fill(engine.destination, "x/old")
        observed = await engine.run()
        assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 1)
        found = {name for name, content in contents(engine.destination).items() if content != "folder"}
        assert found == {"x/one", "x/sub/two", "x/deep/er/three", "x/file"}
        assert engine.codes().count("EXTRA_NOT_DELETED") == 0


async def test_in_a_folder_that_several_items_fill_nothing_is_deleted(quick_path: Path) -> None:
    items = [_item("/a", "/x"), _item("/b", "/x"), _item("/c", "/y")]
    engine = Engine(quick_path, MIRROR, items=items)
    _fill(engine.source, "a/one", "b/two", "b/sub/four", "c/three")
    _fill(engine.destination, "x/one", "x/two", "x/old", "x/sub/old", "y/old")
    observed = await engine.run()
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 1)
    found = {name for name, content in contents(engine.destination).items() if content != "folder"}
    assert found == {"x/one", "x/two", "x/old", "x/sub/four", "x/sub/old", "y/three"}
    assert engine.codes().count("EXTRA_NOT_DELETED") == 1


LINKED_ITEMS = [_item("/a", "/link"), _item("/b", "/real"), _item("/c", "/x"), _item("/d", "/way")]


async def _two_ways(base: Path) -> None:
    """``link`` and ``real`` are one folder, ``way`` is one in ``x``."""
    for time in range(2):
        # The second time everything is there when it is looked for.
        engine = Engine(base, MIRROR, items=LINKED_ITEMS)
        engine.state = base / f"state {time}"
        engine.state.mkdir()
        _fill(engine.source, "a/one", "b/two", "c/three", "d/four")
        _fill(engine.destination, "real/old", "x/old", "x/below/there")
        observed = await engine.run()
        assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 1), observed
        found = {name for name, content in contents(engine.destination).items() if isinstance(content, bytes)}
        # What lies in a folder of one item alone goes.
        assert {name for name in found if name.startswith("real/")} == {"real/one", "real/two", "real/old"}
        assert {name for name in found if name.startswith("x/")} == {"x/three", "x/below/four", "x/below/there"}
        assert engine.codes().count("EXTRA_NOT_DELETED") == 1


async def test_two_ways_to_one_folder_are_one(quick_path: Path) -> None:
    engine = Engine(quick_path)
    _fill(engine.destination, "real/old", "x/below/there")
    (engine.destination / "link").symlink_to("real")
    (engine.destination / "way").symlink_to("x/below")
    await _two_ways(quick_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
async def test_two_mounts_of_one_folder_are_one(quick_path: Path) -> None:
    engine = Engine(quick_path)
    _fill(engine.destination, "real/old", "x/below/there")
    mounted = []
    try:
        for name, to in (("link", "real"), ("way", "x/below")):
            (engine.destination / name).mkdir()
            command = ["mount", "--bind", str(engine.destination / to), str(engine.destination / name)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("no bind mounts here")
            mounted.append(engine.destination / name)
        await _two_ways(quick_path)
    finally:
        for point in mounted:
            subprocess.run(["umount", point], check=True)


class HidingSource(Engine):
    """The source's collection has ``hidden: denied``."""

    def source_root(self) -> Root:
        return offered(super().source_root(), hidden=False)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("kind", [HidingSource, Engine])
async def test_what_a_source_does_not_show_is_not_deleted(quick_path: Path, kind: type[Engine], ahead: bool) -> None:
    """Nobody knows whether the source has it, which many do."""
    engine = kind(quick_path, MIRROR, ahead=ahead)
    _fill(engine.source, "sub/one", "sub/.kept", ".settings/x")
    _fill(
        engine.destination,
        "sub/one",
        "sub/.kept",
        "sub/.other",
        "sub/old",
        ".settings/x",
        ".mine/y",
        "gone/.z",
        "gone/z",
    )
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    kept = {name for name, content in contents(engine.destination).items() if content != "folder"}
    shown = kind is Engine
    always = {"sub/one", "sub/.kept", ".settings/x"}
    assert kept == (always if shown else {*always, "sub/.other", ".mine/y", "gone/.z"})
    # sub/old, gone/z; and sub/.other, .mine, .mine/y, gone/.z, gone where the source says all it has.
    assert observed.counters.deleted == (7 if shown else 2)
    assert engine.codes().count("EXTRA_NOT_DELETED") == (0 if shown else 2)


async def test_what_stays_in_a_folder_that_the_source_lacks_keeps_its_folders(quick_path: Path) -> None:
    """As with rsync: a folder goes only when nothing in it is left out by a filter, or hidden from us."""
    rules = [FilterRule(method="exclude", name="*.keep")]
    engine = HidingSource(quick_path, TaskOptions(delete_destination_extra=True, filter_rules=rules))
    _fill(engine.source, "one")
    _fill(engine.destination, "gone/a/b/x.keep", "gone/a/b/y", "gone/a/c/z", "gone/d/.dot/inner", "gone/e", "all/of/it")
    _fill(engine.destination, "gone/a/.towpath.left", "/".join(["deep"] * (MAX_OPEN + 3)) + "/file")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    kept = {name for name, content in contents(engine.destination).items() if content != "folder"}
    # What is too deep to be looked through stays altogether.
    assert {name for name in kept if not name.startswith("deep")} == {"one", "gone/a/b/x.keep", "gone/d/.dot/inner"}
    assert [name for name in kept if name.startswith("deep")]
    folders = {name for name, content in contents(engine.destination).items() if content == "folder"}
    assert {name for name in folders if not name.startswith("deep")} == {
        "gone",
        "gone/a",
        "gone/a/b",
        "gone/d",
        "gone/d/.dot",
    }
    # gone/a/b/y, gone/a/c, gone/a/c/z, gone/e, all, all/of, all/of/it, and the temporary.
    assert observed.counters.deleted == 8
    assert engine.codes().count("EXTRA_NOT_DELETED") == 1


def test_what_was_missing_once_is_not_deleted_when_the_next_listing_breaks_off(tmp_path: Path) -> None:
    """A name that came to the source between two runs would be deleted right after it was brought over."""
    _fill(tmp_path, "one", "two")
    journal = Journal(tmp_path.parent / "journal.sqlite")
    with closing(journal), open_root(str(tmp_path)) as root:
        journal.add_directories([(0, b"", b"", 0, [])])
        row = journal.next_directory()
        assert row is not None
        rows = [Row(name, FILE, 7, 0, 0, 1, index, 0o644) for index, name in enumerate((b"one", b"two"))]
        for listed, whole in ((rows[:1], True), (rows, False)):
            planner = DirectoryPlanner(
                root, journal, MIRROR, row, prefix=b".towpath.t.", sweep=lambda _: None, patience=Patience()
            )
            planner.take(listed)
            if whole:
                planner.note_extra()
                assert list(journal.extras()) == [(b"", b"two")]
            planner.group.handle.close()
        assert list(journal.extras()) == []


async def test_a_mirror_deletes_nothing_where_a_link_leads_out_of_it(quick_path: Path) -> None:
    """What is written follows the link, as it is there; what lies there is no part of the mirror."""
    items = [TaskItem(source_path="/", destination_path="/mirror", recursive=True)]
    engine = Engine(quick_path, MIRROR, items=items)
    _fill(engine.source, "current/new", "plain/kept")
    _fill(engine.destination, "archive/precious", "mirror/old", "mirror/plain/old")
    (engine.destination / "mirror" / "current").symlink_to("../archive")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "archive" / "precious").exists()
    assert (engine.destination / "archive" / "new").exists()
    assert sorted(os.listdir(engine.destination / "mirror")) == ["current", "plain"]
    assert sorted(os.listdir(engine.destination / "mirror" / "plain")) == ["kept"]
    assert engine.codes().count("EXTRA_NOT_DELETED") == 1


async def test_a_mirror_follows_the_links_by_which_it_was_sent_to_its_place(quick_path: Path) -> None:
    items = [TaskItem(source_path="/", destination_path="/link/mirror", recursive=True)]
    engine = Engine(quick_path, MIRROR, items=items)
    _fill(engine.source, "folder/new")
    _fill(engine.destination, "real/mirror/old", "real/mirror/folder/old")
    (engine.destination / "link").symlink_to("real")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination / "real" / "mirror") == contents(engine.source)
    assert observed.counters.deleted == 2


async def test_a_folder_that_became_a_link_before_the_mirror_deletes_is_left_alone(quick_path: Path) -> None:
    """Between the listing and the deleting there may be days."""
    engine = Engine(quick_path, MIRROR)
    _fill(engine.source, "folder/new", "z/last")
    _fill(engine.destination, "folder/old", "other/old")

    check = Mirror._refuse_too_many

    def swapped(mirror: Mirror) -> None:
        (engine.destination / "folder").rename(engine.base / "moved")
        (engine.destination / "folder").symlink_to("other")
        check(mirror)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Mirror, "_refuse_too_many", swapped)
        patched.setattr(Journal, "extras", lambda _journal: iter([(b"folder", b"old")]))
        observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "other" / "old").exists()
    assert observed.counters.deleted == 0


@pytest.mark.parametrize("rests", [True, False], ids=["once", "at every listing"])
async def test_nothing_is_deleted_where_names_changed_while_they_were_listed(quick_path: Path, *, rests: bool) -> None:
    """A file that gets another name meanwhile may be listed under neither, and would be deleted and not copied. The
    folder is listed again, but not for ever."""
    engine = Engine(quick_path, TaskOptions(delete_destination_extra=True))
    _fill(engine.source, "busy/file", "busy/old", "calm/file")
    _fill(engine.destination, "busy/extra", "busy/old", "calm/extra")
    (engine.source / "busy" / "file").chmod(0o640)
    renamed = 0

    def plan(call: Call) -> int | None:
        nonlocal renamed
        # The folder is being listed: of a file with such a mode the access list is looked at.
        if (call.operation, call.name) == ("mode_without_list", b"file") and not (rests and renamed):
            renamed += 1
            names = [engine.source / "busy" / name for name in ("old", "new")]
            before, after = names if renamed % 2 else reversed(names)
            before.rename(after)
        return None

    engine.source_plan = plan
    observed = await engine.run()
    assert not (engine.destination / "calm" / "extra").exists()
    told = [event.details for event in engine.events if event.code == "EXTRA_NOT_DELETED"]
    if rests:
        assert (renamed, told, observed.counters.deleted) == (1, [], 3)
        assert contents(engine.destination) == contents(engine.source)
        return
    assert renamed == 1 + LOOKS
    assert observed.counters.deleted == 1
    assert {path.name for path in (engine.destination / "busy").iterdir()} >= {"extra", "old"}
    assert len(told) == 1
    assert told[0].startswith("Names changed in the source's folder of /busy/ while they were listed")
    engine.source_plan = no_faults
    # The next one knows again what is there.
    again = Engine(quick_path, engine.options)
    again.state = quick_path / "again"
    again.state.mkdir()
    observed = await again.run()
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 2)
    assert contents(again.destination) == contents(again.source)

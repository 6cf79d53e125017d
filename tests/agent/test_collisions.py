"""Names that would be one name at the destination: found before anything of their folder is sent, decided by one rule,
told; and nothing is overwritten or deleted for their sake."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.storage import folding
from agent.storage.faulty import Call
from agent.storage.folding import ask, by_attribute, fold_key
from agent.storage.posix import open_root
from agent.transfer.planning import collisions, gathered_names
from protocol.control import TaskItem, TaskOptions
from protocol.errors import ItemFailed
from protocol.session import Row
from tests.agent.engine_inside import CHECKED, Crashed, Engine, contents, quick_path, skipped, tree
from tests.agent.folding_root import FoldingRoot, folded

__all__ = ["quick_path"]

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


NAMES = ["README", "readme", "ReadMe", "other", COMPOSED, DECOMPOSED, "Docs/a", "docs/b", "stra\u00dfe", "STRASSE"]


async def test_collisions_are_found_decided_and_told(quick_path: Path) -> None:
    engine = Engine(quick_path, wrap=FoldingRoot.around)
    tree(engine.source, NAMES)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 5)
    # The first in the order of bytes has the name.
    wanted = {"README", "other", DECOMPOSED, "Docs", "Docs/a", "STRASSE"}
    there = contents(engine.destination)
    assert set(there) == wanted
    assert all(there[name] in ("folder", f"content of {name}".encode()) for name in wanted)
    assert skipped(engine) == dict.fromkeys(["ReadMe", "readme", COMPOSED, "docs", "stra\u00dfe"], "NAME_COLLISION")
    told = [event.details for event in engine.events if event.code == "NAME_COLLISION"]
    assert len(told) == 5
    assert any("ReadMe and README are one name" in details and "(source owner)" in details for details in told)
    print(f"collisions: {observed.counters.failed}, names in their places: {len(wanted)}")
    # Nothing of the folder was created before the answer was known.
    operations = [call for call in engine.calls if call.operation in ("create_temporary", "rename", "mkdir")]
    probes = [index for index, call in enumerate(operations) if call.name.endswith(b".README")]
    first_file = next(index for index, call in enumerate(operations) if call.operation in ("rename", "mkdir"))
    assert probes
    assert probes[-1] < first_file
    assert engine.temporaries() == []


async def test_a_folder_with_more_names_of_one_key_than_can_be_compared_fails_alone(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a source could fill the memory of a destination that has to know such names before it takes one."""
    monkeypatch.setattr(gathered_names, "MOST", 5_000)
    monkeypatch.setattr(gathered_names, "MANY", 2_000)
    engine = Engine(quick_path, wrap=FoldingRoot.around)
    spelt = {"".join(letters) for letters in itertools.product("aA", "bB", "cC", "dD")}
    tree(engine.source, [*(f"many/{name}" for name in spelt), "few/A", "few/a", "few/b", "other/c"])
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 2)
    assert skipped(engine) == {"many": "TOO_MANY_NAMES", "few/a": "NAME_COLLISION"}
    assert set(contents(engine.destination)) == {"many", "few", "few/A", "few/b", "other", "other/c"}


def test_names_of_one_key_that_all_differ_are_not_all_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with each other one: a source could have a destination make files for days."""
    asked = 0

    def differ(*_: object) -> bool:
        nonlocal asked
        asked += 1
        return False

    monkeypatch.setattr(collisions, "_are_one", differ)
    spelt = [bytes(letters) for letters in itertools.product(*[b"aA"] * 9)]
    with open_root(str(tmp_path)) as root, root.open_directory(()) as handle:
        assert collisions.losers(root, handle, spelt[:40], b".probe.") == {}
        assert asked == 40 * 39 // 2
        asked = 0
        with pytest.raises(ItemFailed) as caught:
            collisions.losers(root, handle, spelt, b".probe.")
    print(f"asked {asked} times about {len(spelt)} names")
    assert caught.value.code == "TOO_MANY_NAMES"
    assert asked < 20 * len(spelt)


async def test_a_folder_is_planned_in_pieces_once_its_names_are_compared(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered_names, "_PIECE", 2)
    engine = Engine(quick_path, wrap=FoldingRoot.around)
    tree(engine.source, [*(f"{name}{number}" for name in "aAb" for number in range(7)), "d/x", "d/X", "e/y"])
    observed = await engine.run()
    assert observed.counters.failed == 8
    wanted = {f"{name}{number}" for name in "Ab" for number in range(7)} | {"d", "d/X", "e", "e/y"}
    assert set(contents(engine.destination)) == wanted


def test_rows_are_taken_in_their_order_and_let_go() -> None:
    rows = [Row(b"%d" % number, 0, 0, 0, 0, 0, 0, 0) for number in range(2500)]
    taken = list(rows)
    assert [row for piece in gathered_names.pieces(taken) for row in piece] == rows
    assert taken == []


async def test_the_same_names_are_different_where_case_counts(quick_path: Path) -> None:
    engine = Engine(quick_path)
    tree(engine.source, NAMES)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


async def test_the_spelling_that_is_there_keeps_its_name_also_after_a_crash(quick_path: Path) -> None:
    deaths = 0
    for number in range(5, 400, 9):

        def plan(call: object, number: int = number) -> int | None:
            if getattr(call, "number", 0) == number:
                raise Crashed
            return None

        engine = Engine(quick_path / str(number), plan=plan, wrap=FoldingRoot.around)
        tree(engine.source, ["a/readme", "a/README", "a/ReadMe", "a/x"])
        (engine.destination / "a").mkdir()
        (engine.destination / "a" / "readme").write_text("older")
        try:
            await engine.run()
        except Crashed:
            deaths += 1
            engine = engine.revived()
            engine.wrap = FoldingRoot.around
            observed = await engine.run()
            assert (observed.state, observed.counters.failed) == ("FAILED", 2)
        assert contents(engine.destination / "a") == {"readme": b"content of a/readme", "x": b"content of a/x"}
        assert set(skipped(engine)) == {"a/README", "a/ReadMe"}
        assert engine.temporaries() == []
    assert deaths > 3


async def test_a_mirror_does_not_delete_what_has_another_spelling(quick_path: Path) -> None:
    options = TaskOptions(delete_destination_extra=True, verify_checksum=True)
    engine = Engine(quick_path, options, wrap=FoldingRoot.around)
    tree(engine.source, ["readme", "folder/file"])
    tree(engine.destination, ["README", "FOLDER/FILE", "extra"])
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert observed.counters.deleted == 1
    there = {folded(os.fsencode(name)): content for name, content in contents(engine.destination).items()}
    assert there == {"readme": b"content of readme", "folder": "folder", "folder/file": b"content of folder/file"}


async def test_items_with_one_name_are_decided_by_their_order(quick_path: Path) -> None:
    for wrap, failed in ((FoldingRoot.around, {"b", "c"}), (lambda root: root, {"c"})):
        base = quick_path / str(len(failed))
        engine = Engine(base, msgspec.structs.replace(CHECKED, preserve_timestamp=False), items=[], wrap=wrap)
        tree(engine.source, ["a", "b", "c", "d"])
        pairs = [("a", "x/Name"), ("b", "x/name"), ("c", "x/Name"), ("d", "x/other"), ("d", "x/other")]
        engine.items = [TaskItem(source_path=f"/{source}", destination_path=f"/{name}") for source, name in pairs]
        observed = await engine.run()
        assert (observed.state, observed.counters.failed) == ("FAILED", len(failed))
        assert skipped(engine) == dict.fromkeys(failed, "NAME_COLLISION")
        assert (engine.destination / "x" / "Name").read_text() == "content of a"
        assert (engine.destination / "x" / "other").read_text() == "content of d"


async def test_names_that_are_too_long_to_be_asked_about_do_not_overwrite_each_other(quick_path: Path) -> None:
    engine = Engine(quick_path, wrap=FoldingRoot.around)
    tree(engine.source, ["x" * 250, "X" * 250])
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert set(contents(engine.destination)) == {"X" * 250}


@pytest.mark.parametrize(
    "names",
    [
        ["README", "readme"],
        [COMPOSED, DECOMPOSED, COMPOSED.upper()],
        ["stra\u00dfe", "STRASSE"],
        ["\u212a", "k", "K"],
        ["\ufb01", "fi"],
        ["a\u200db", "ab"],
        ["\u03a3", "\u03c3", "\u03c2"],
        ["\u0131", "I", "i"],
        ["name.", "name", "name. ."],
    ],
)
def test_one_key_for_what_some_file_system_takes_for_one_name(names: list[str]) -> None:
    assert len({fold_key(name.encode()) for name in names}) == 1


@pytest.mark.parametrize("dropped", [b".", b" ", b". ", b""])
def test_a_folder_that_drops_dots_or_spaces_at_the_end_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: bytes
) -> None:
    """FAT does, also where it is mounted so that it tells case apart (``iocharset=utf8``); other names it refuses."""
    stat = os.stat

    def dropping(name: bytes, **options: Any) -> os.stat_result:
        if name.endswith(b" ") and b" " not in dropped:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return stat(name.rstrip(dropped) if dropped else name, **options)

    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", dropping)
            assert ask(descriptor, b".towpath.") == bool(dropped)
        assert os.listdir(descriptor) == []
    finally:
        os.close(descriptor)


@given(st.binary(min_size=1, max_size=40))
def test_keys_never_fail_and_never_miss_what_plain_folding_finds(name: bytes) -> None:
    key = fold_key(name)
    assert key
    assert fold_key(os.fsencode(os.fsdecode(name))) == key
    if name.isascii():
        assert fold_key(name.upper()) == fold_key(name.lower())


def test_folders_on_this_machine_answer_for_themselves(tmp_path: Path) -> None:
    with open_root(str(tmp_path)) as root, root.open_directory(()) as folder:
        assert folder.folds(b".towpath.x.") is ((tmp_path.parent / tmp_path.name.upper()).exists())
        assert list(tmp_path.iterdir()) == []
        descriptor = folder.fileno()
        assert descriptor is not None
        assert ask(descriptor, b".towpath.x.") is False
        assert by_attribute("ext3", descriptor) is False
        assert by_attribute("vfat", descriptor) is None
    assert list(tmp_path.iterdir()) == []


async def test_names_that_cannot_be_there_at_all_hold_nothing_up(quick_path: Path) -> None:
    """FAT and its like refuse some characters: whether two such names are one is no question then."""

    def plan(call: Call) -> int | None:
        return errno.EINVAL if b":" in call.name and call.operation in ("create_temporary", "rename") else None

    engine = Engine(quick_path, plan=plan, wrap=FoldingRoot.around)
    tree(engine.source, ["Track: One", "track: one", "README", "readme", "other"])
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 3)
    assert set(contents(engine.destination)) == {"README", "other"}
    assert skipped(engine) == {"Track: One": "ILLEGAL_NAME", "track: one": "ILLEGAL_NAME", "readme": "NAME_COLLISION"}


async def test_a_fault_while_names_are_compared_is_got_over(quick_path: Path) -> None:
    faults: list[Call] = []

    def plan(call: Call) -> int | None:
        if call.operation == "create_temporary" and call.name.endswith(b".README") and len(faults) < 2:
            faults.append(call)
            return errno.EIO
        return None

    engine = Engine(quick_path, plan=plan, wrap=FoldingRoot.around)
    tree(engine.source, ["README", "readme", "other"])
    await engine.run()
    assert len(faults) == 2
    assert skipped(engine) == {"readme": "NAME_COLLISION"}
    assert set(contents(engine.destination)) == {"README", "other"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.ESTALE])
def test_a_folder_that_cannot_be_asked_for_the_moment_is_not_taken_for_one_that_tells_names_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A mirror would delete what it has just brought, under the spelling that was there before."""

    def refusing(_descriptor: int, _prefix: bytes) -> bool:
        raise OSError(code, os.strerror(code))

    known: dict[int, bool] = {}
    with open_root(str(tmp_path)) as root, root.open_directory(()) as folder:
        descriptor = folder.fileno()
        assert descriptor is not None
        monkeypatch.setattr(folding, "ask", refusing)
        with pytest.raises(OSError, match=os.strerror(code)):
            folding.folds("vfat", descriptor, b".towpath.", known, 1)
        monkeypatch.setattr(folding, "ask", lambda *_: True)
        assert folding.folds("vfat", descriptor, b".towpath.", known, 1)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_in_which_nothing_can_be_made_is_asked_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refusing(_descriptor: int, _prefix: bytes) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folding, "ask", refusing)
    assert not folding.folds("vfat", -1, b".towpath.", {}, 1)

"""Names put aside on disk come back as they were, or not at all; and what a mirror deletes is what plain sets say."""

from __future__ import annotations

import errno
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.storage.folding import fold_key
from agent.storage.posix import open_root
from agent.transfer.books import spill
from agent.transfer.books.journal import Journal
from agent.transfer.books.spill import Spill, part_of
from agent.transfer.books.state_trouble import StateDamaged, StateTrouble
from agent.transfer.planning import gathered_names, source_names
from agent.transfer.planning.extras import Extras
from agent.transfer.planning.filled_places import FilledPlaces
from agent.transfer.planning.gathered_names import GatheredNames
from agent.transfer.planning.source_names import SourceNames
from protocol.errors import ItemFailed
from protocol.session import FILE, Row
from tests.agent.engine_inside import quick_path
from tests.agent.faulty_spill import DAMAGES, Faults, with_small_limits

__all__ = ["quick_path"]

# Few letters, so that names meet; and names in no encoding.
NAMES = st.lists(
    st.one_of(
        st.text("aAb\u00e9\u00c9\u0301e.", min_size=1, max_size=6).map(str.encode),
        st.binary(min_size=1, max_size=30).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")),
    ),
    max_size=60,
)
SPELLINGS = pytest.mark.parametrize("spelled", [bytes, fold_key])


@pytest.fixture(scope="module")
def limits() -> Iterator[Faults]:
    with pytest.MonkeyPatch.context() as patch:
        yield with_small_limits(patch, Faults())


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@given(names=NAMES)
def test_what_is_put_aside_comes_back_once_and_by_its_key(names: list[bytes], limits: Faults, place: Path) -> None:
    with closing(Spill(place, bytes)) as aside:
        half = len(names) // 2
        aside.add(names[:half], fold_key)
        aside.add(names[half:], fold_key)
        found = {part: [name for some in aside.read(part) for name in some] for part in range(spill.PARTS)}
        for part, some in found.items():
            assert all(part_of(fold_key(name)) == part for name in some)
            assert aside.count(part) == len(some)
        assert sorted(name for some in found.values() for name in some) == sorted(names)
        assert sorted(name for some in aside.read_all() for name in some) == sorted(names)
    assert limits.open == 0
    assert os.listdir(place) == []


@SPELLINGS
@given(source=NAMES, there=NAMES, batch=st.integers(1, 20))
def test_a_mirror_finds_what_plain_sets_find(
    source: list[bytes], there: list[bytes], batch: int, spelled: Callable[[bytes], bytes], limits: Faults, place: Path
) -> None:
    with closing(SourceNames(place, spelled)) as names:
        for start in range(0, len(source), batch):
            names.add(source[start : start + batch])
        found = list(names.lacking(iter(there)))
    known = set(map(spelled, source))
    assert sorted(found) == sorted(name for name in there if spelled(name) not in known)
    assert limits.open == 0


@given(names=NAMES, batch=st.integers(1, 20))
def test_what_may_be_one_name_is_in_one_portion(names: list[bytes], batch: int, limits: Faults, place: Path) -> None:
    rows = [Row(name, FILE, number, 0, 0, 0, 0, 0) for number, name in enumerate(names)]
    with closing(GatheredNames(place)) as gathered:
        for start in range(0, len(rows), batch):
            gathered.add_untrusted(rows[start : start + batch])
        portions = list(gathered.portions())
        many = gathered.are_many
    assert many == (sum(500 + 2 * len(name) for name in names) > gathered_names.MANY)
    if not many:
        assert portions == [rows]
    assert sorted((row for portion in portions for row in portion), key=lambda row: row.size) == rows
    keys = [fold_key(row.name) for portion in portions for row in {fold_key(row.name): row for row in portion}.values()]
    assert len(keys) == len(set(keys))
    assert limits.open == 0


SOURCE = [b"name %d" % number for number in range(25)]
THERE = [*SOURCE, *(b"extra %d" % number for number in range(10))]


def compared(place: Path, faults: Faults) -> set[bytes] | None:
    """What is found to be extra, None if that cannot be told; what was found before that was told is checked."""
    found: set[bytes] = set()
    with pytest.MonkeyPatch.context() as patch:
        with_small_limits(patch, faults)
        with closing(SourceNames(place)) as names:
            try:
                names.add(SOURCE[:10])
                names.add(SOURCE[10:])
                found.update(names.lacking(THERE))
            except StateTrouble as error:
                assert isinstance(error, StateDamaged) or error.code in ("NO_SPACE", "STATE_UNAVAILABLE")
                assert str(place) in error.sentence
                assert "names" in error.sentence or error.code == "NO_SPACE"
                assert not found & set(SOURCE)
                return None
            finally:
                assert not found & set(SOURCE)
    assert faults.open == 0
    return found


def only(operation: str, number: int, fate: int | str, called: str, nth: int) -> int | str | None:
    """The plan of one fault."""
    return fate if (called, nth) == (operation, number) else None


def test_no_fault_of_the_disk_makes_a_name_of_the_source_an_extra(tmp_path: Path) -> None:
    """Each call fails, or is damaged in silence, once each."""
    counted = Faults()
    extra = compared(tmp_path, counted)
    assert extra == set(THERE) - set(SOURCE)
    assert min(counted.counts[operation] for operation in ("open", "write", "read")) > 1
    tried = noticed = 0
    for operation, count in counted.counts.items():
        for fate in (errno.ENOSPC, errno.EIO, *(DAMAGES if operation == "write" else ())):
            for number in range(1, count + 1):
                result = compared(tmp_path, Faults(partial(only, operation, number, fate)))
                assert result in (None, extra)
                tried += 1
                noticed += result is None
    print(f"faults: {tried}, of them noticed {noticed}")
    assert noticed == tried > 500
    assert os.listdir(tmp_path) == []


def test_names_that_were_not_all_kept_are_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Faults(lambda operation, nth: errno.ENOSPC if operation == "write" else None)
    with_small_limits(monkeypatch, full)
    names = SourceNames(tmp_path)
    with pytest.raises(StateTrouble) as caught:
        names.add(SOURCE)
    assert caught.value.code == "NO_SPACE"
    full.plan = lambda _operation, _nth: None
    names.add([b"another"])
    with pytest.raises(RuntimeError, match="Not every name"):
        list(names.lacking(THERE))
    names.close()
    names = SourceNames(tmp_path)
    names.add([b"one"])
    names.close()
    with pytest.raises(RuntimeError, match="Not every name"):
        list(names.lacking([b"one"]))


def test_a_write_that_failed_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is let go before it is on the disk."""
    faults = Faults(lambda operation, nth: errno.ENOSPC if (operation, nth) == ("write", 2) else None)
    with_small_limits(monkeypatch, faults)
    monkeypatch.setattr(spill, "_AT_ONCE", 100)
    with closing(Spill(tmp_path, bytes)) as aside:
        with pytest.raises(StateTrouble):
            aside.add(SOURCE, bytes)
        aside.add([b"another"], bytes)
        assert sorted(name for some in aside.read_all() for name in some) == sorted([*SOURCE, b"another"])


def test_what_memory_lost_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_limits(monkeypatch, Faults())
    with closing(Spill(tmp_path, bytes)) as aside:
        aside.add(SOURCE, bytes)
        aside._newest.clear()
        with pytest.raises(StateDamaged):
            list(aside.read_all())


def test_a_part_that_is_large_comes_in_several_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_limits(monkeypatch, Faults())
    with closing(GatheredNames(tmp_path)) as gathered:
        gathered.add_untrusted([Row(b"%d" % number, FILE, 0, 0, 0, 0, 0, 0) for number in range(90)])
        portions = list(gathered.portions())
    assert len(portions) > 2 * gathered_names.PARTS
    # A quarter of 2,000 bytes each, on the whole.
    assert max(map(len, portions)) < 25
    assert sum(map(len, portions)) == 90


def test_of_extras_that_cannot_all_be_read_back_none_is_noted(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = quick_path / "place"
    place.mkdir()
    for name in THERE:
        (place / name.decode()).touch()
    failed = 0
    with closing(Journal(quick_path / "journal.sqlite")) as journal, open_root(str(place)) as root:
        for last in range(1, 5000, 7):
            faults = with_small_limits(monkeypatch, Faults(partial(only, "read", last, errno.EIO)))
            with closing(root.open_directory(())) as handle:
                extras = Extras(root, journal, handle, (), top=(), filled=FilledPlaces(()), rules=(), folds=False)
                extras.add(SOURCE)
                try:
                    extras.note(source_hides=False, source_changed=False)
                except StateTrouble:
                    failed += 1
                    assert list(journal.extras()) == []
                else:
                    break
            assert faults.open == 0
        assert {name for _, name in journal.extras()} == set(THERE) - set(SOURCE)
    assert failed > 20


def test_more_names_with_one_key_than_can_be_compared_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_small_limits(monkeypatch, Faults())
    monkeypatch.setattr(gathered_names, "MOST", 10_000)
    spelt = [
        b"".join(letter.upper() if 1 << at & n else letter for at, letter in enumerate([b"a"] * 6)) for n in range(64)
    ]
    with closing(GatheredNames(tmp_path)) as gathered:
        gathered.add_untrusted([Row(name, FILE, 0, 0, 0, 0, 0, 0) for name in spelt])
        with pytest.raises(ItemFailed) as caught:
            list(gathered.portions())
    assert caught.value.code == "TOO_MANY_NAMES"


def test_memory_does_not_grow_with_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_names, "HELD", 50_000)
    monkeypatch.setattr(spill, "BUFFERED", 50_000)
    monkeypatch.setattr(spill, "PARTS", 32)
    monkeypatch.setattr(source_names, "PARTS", 32)
    count = 15_000
    with closing(SourceNames(tmp_path)) as names:
        tracemalloc.start()
        try:
            for start in range(0, count, 1000):
                names.add(b"%d" % number for number in range(start, start + 1000))
            extra = names.lacking(b"%d" % number for number in range(1000, count + 1000))
            assert sum(1 for _ in extra) == 1000
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    print(f"most at once: {most}")
    # A set of them takes 1.5 MB.
    assert most < 500_000

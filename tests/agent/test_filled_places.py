"""What a mirror leaves alone because other items of its task lead there; plain decisions."""

from __future__ import annotations

from agent.transfer.planning.filled_places import FilledPlaces
from protocol.control import TaskItem


def places(*items: str, single: tuple[str, ...] = ()) -> FilledPlaces:
    """Folders that are transferred to these paths, and single files."""
    made = [TaskItem(source_path="/x", destination_path=path, recursive=True) for path in items]
    return FilledPlaces(made + [TaskItem(source_path="/x", destination_path=path, recursive=False) for path in single])


def test_names_on_the_way_to_other_items_are_known_in_each_folder() -> None:
    filled = places("/a", "/a/b/c", single=("/a/file",))
    assert filled.names(()) == {b"a"}
    assert filled.names((b"a",)) == {b"b", b"file"}
    assert filled.names((b"a", b"b")) == {b"c"}
    assert filled.names((b"a", b"b", b"c")) == set()
    assert filled.names((b"elsewhere",)) == set()


def test_a_folder_gets_something_of_several_items_where_one_lies_in_another_or_is_it() -> None:
    nested = places("/a", "/a/b/c", "/other")
    assert nested.several((b"a", b"b", b"c"))
    assert nested.several((b"a", b"b", b"c", b"below"))
    # What lies beside it comes from one of them alone, and names tell what the other one puts there.
    assert not nested.several((b"a", b"b"))
    assert not nested.several((b"a",))
    assert not nested.several(())
    assert not nested.several((b"other",))
    twice = places("/a", "/a")
    assert twice.several((b"a",))
    assert twice.several((b"a", b"below"))
    assert not twice.several(())


def test_single_files_make_no_folder_one_of_several() -> None:
    filled = places("/a", single=("/a/b/file", "/a/b/file", "/c"))
    assert not any(filled.several(folder) for folder in ((), (b"a",), (b"a", b"b"), (b"a", b"b", b"file")))


def test_names_that_differ_in_form_only_are_one() -> None:
    filled = places("/Data", "/data/\u00e9t\u00e9")
    assert filled.names((b"DATA",)) == filled.names((b"data",)) != set()
    assert filled.several((b"Data", "e\u0301te\u0301".encode()))


def test_an_item_with_a_name_that_cannot_be_is_left_out() -> None:
    filled = places("/a", "/b\0")
    assert filled.names(()) == {b"a"}
    assert not filled.several((b"a",))
    assert places("/b\0").names(()) == set()

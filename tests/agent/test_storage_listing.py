"""``ls`` and ``stat``: Globus's grammar of filters and orders, symlinks, names of accounts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.storage.base import Root
from agent.storage.listing import Accounts, list_directory, stat_entry
from agent.storage.posix import open_root
from agent.storage.query import (
    MAX_GLOBS,
    Query,
    parse_filter_untrusted,
    parse_orderby_untrusted,
    parse_query_untrusted,
)
from protocol.control import MAX_ENTRIES, Listing
from protocol.errors import ItemFailed, NeedsPerson, ProtocolError

SECOND = 1_000_000_000


@pytest.fixture()
def root(tmp_path: Path) -> Iterator[Root]:
    place = tmp_path / "root"
    (place / "data").mkdir(parents=True)
    for name, size, day in (("b.txt", 10, 1), ("A.txt", 20, 2), ("c.dat", 20, 3), (".hidden", 5, 4), ("x,y.txt", 0, 5)):
        (place / "data" / name).write_bytes(b"x" * size)
        os.utime(place / "data" / name, ns=(0, (1_767_225_600 + (day - 1) * 86400) * SECOND))
    (place / "data" / "sub").mkdir(mode=0o750)
    (place / "data" / ".towpath.1").write_bytes(b"")
    os.symlink("c.dat", place / "data" / "to_file")
    os.symlink("sub", place / "data" / "to_dir")
    os.symlink("/etc/passwd", place / "data" / "to_outside")
    os.symlink("nothing", place / "data" / "to_nothing")
    os.symlink("to_loop", place / "data" / "to_loop")
    os.mkfifo(place / "data" / "pipe")
    with open_root(str(place)) as made:
        yield made


def ls(root: Root, *filters: str, path: tuple[bytes, ...] = (b"data",), **options: object) -> Listing:
    query = parse_query_untrusted(filters=filters, **options)  # type: ignore[arg-type]
    return list_directory(root, path, query, Accounts())


def names(listing: Listing) -> list[str]:
    return [entry.name for entry in listing.entries]


ALL = [".hidden", "A.txt", "b.txt", "c.dat", "pipe", "sub", "to_dir", "to_file", "to_loop", "to_nothing", "to_outside"]
EVERYTHING = sorted([*ALL, "x,y.txt"])


def test_everything(root: Root) -> None:
    listing = ls(root)
    assert names(listing) == EVERYTHING
    assert (listing.path, listing.absolute_path, listing.total) == ("/data/", "/data/", len(EVERYTHING))
    assert names(ls(root, path=())) == ["data"]
    assert ls(root, path=()).path == "/"


def test_hidden_names(root: Root) -> None:
    assert ".hidden" not in names(ls(root, show_hidden=False))
    assert ".towpath.1" not in names(ls(root))


def test_types_and_links(root: Root) -> None:
    rows = {entry.name: entry for entry in ls(root).entries}
    assert {name: row.type for name, row in rows.items()} == {
        ".hidden": "file",
        "A.txt": "file",
        "b.txt": "file",
        "c.dat": "file",
        "pipe": "pipe",
        "sub": "dir",
        "to_dir": "dir",
        "to_file": "file",
        "to_loop": "invalid_symlink",
        "to_nothing": "invalid_symlink",
        "to_outside": "invalid_symlink",
        "x,y.txt": "file",
    }
    link, plain = rows["to_file"], rows["c.dat"]
    assert (link.size, link.mtime_ns, link.link_target, link.link_size) == (20, plain.mtime_ns, "c.dat", 5)
    assert link.link_mtime_ns is not None
    assert (plain.link_target, plain.link_size, plain.link_mtime_ns) == (None, None, None)
    assert rows["sub"].mode == 0o750
    # Nothing of what lies outside is shown but the text of the link.
    assert rows["to_outside"].size == len("/etc/passwd")
    assert rows["to_outside"].link_target == "/etc/passwd"


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["name:b.txt"], ["b.txt"]),
        (["name:=b.txt"], ["b.txt"]),
        (["name:=B.TXT"], []),
        (["name:~*.TXT"], ["A.txt", "b.txt", "x,y.txt"]),
        (["name:~?.txt"], ["A.txt", "b.txt"]),
        (["name:~*.txt,~*.dat"], ["A.txt", "b.txt", "c.dat", "x,y.txt"]),
        (["name:~*.txt,!b.txt"], ["A.txt", "x,y.txt"]),
        (["name:~*.txt,!=b.txt,!~x*"], ["A.txt"]),
        (["name:!~*.txt/type:file"], [".hidden", "c.dat", "to_file"]),
        (["name:!c.dat/type:file/size:20"], ["A.txt", "to_file"]),
        (["name:x␛2Cy.txt"], ["x,y.txt"]),
        (["type:dir"], ["sub", "to_dir"]),
        (["type:dir,pipe"], ["pipe", "sub", "to_dir"]),
        (["type:invalid_symlink"], ["to_loop", "to_nothing", "to_outside"]),
        (["type:dir", "name:~*.dat"], ["c.dat", "sub", "to_dir"]),
        (["size:20"], ["A.txt", "c.dat", "to_file"]),
        (["size:10,5/type:file"], [".hidden", "b.txt"]),
        (["size:>10/type:file"], ["A.txt", "c.dat", "to_file"]),
        (["size:>=10,<20/type:file"], ["b.txt"]),
        (["size:<6/type:file"], [".hidden", "x,y.txt"]),
        (["last_modified:2026-01-02,2026-01-03/type:file"], ["A.txt", "c.dat", "to_file"]),
        (["last_modified:,2026-01-01 00:00:00/type:file"], ["b.txt"]),
        (["last_modified:2026-01-04T01:00:00+01:00,2026-01-05/type:file"], [".hidden", "x,y.txt"]),
        (["last_modified:2026-01-05/type:file"], ["x,y.txt"]),
        (["", ""], EVERYTHING),
        (["name:"], []),
    ],
)
def test_filters(root: Root, filters: list[str], expected: list[str]) -> None:
    listing = ls(root, *filters)
    assert names(listing) == expected
    assert listing.total == len(expected)


@pytest.mark.parametrize(
    ("orderby", "expected"),
    [
        ("", [".hidden", "A.txt", "b.txt", "c.dat", "to_file", "x,y.txt"]),
        ("name DESC", ["x,y.txt", "to_file", "c.dat", "b.txt", "A.txt", ".hidden"]),
        ("size desc, name", ["A.txt", "c.dat", "to_file", "b.txt", ".hidden", "x,y.txt"]),
        ("size,name DESC", ["x,y.txt", ".hidden", "b.txt", "to_file", "c.dat", "A.txt"]),
        ("last_modified", ["b.txt", "A.txt", "c.dat", "to_file", ".hidden", "x,y.txt"]),
        ("user,group,permissions,type ASC,size", ["x,y.txt", ".hidden", "b.txt", "A.txt", "c.dat", "to_file"]),
    ],
)
def test_orders(root: Root, orderby: str, expected: list[str]) -> None:
    assert names(ls(root, "type:file", orderby=orderby)) == expected


def test_pages(root: Root) -> None:
    first = ls(root, limit=5)
    second = ls(root, limit=5, offset=5)
    third = ls(root, limit=5, offset=10)
    assert names(first) + names(second) + names(third) == EVERYTHING
    assert {page.total for page in (first, second, third)} == {len(EVERYTHING)}
    assert (second.limit, second.offset) == (5, 5)
    assert names(ls(root, offset=1000)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"limit": MAX_ENTRIES + 1},
        {"offset": -1},
        {"orderby": "colour"},
        {"orderby": "name UP"},
        {"orderby": "name ASC DESC"},
        {"filters": ["colour:red"]},
        {"filters": ["name"]},
        {"filters": ["type:folder"]},
        {"filters": ["size:big"]},
        {"filters": ["size:<>3"]},
        {"filters": ["size:²"]},
        {"filters": ["size:" + "9" * 5000]},
        {"filters": ["size:-1"]},
        {"filters": ["last_modified:yesterday"]},
        {"filters": ["last_modified:,"]},
        {"filters": ["last_modified:a,b,c"]},
        {"filters": ["name:\ud800"]},
        {"filters": ["name:" + "x" * 5000]},
        {"filters": ["name:x"] * 33},
    ],
)
def test_bad_queries_get_a_sentence(options: dict[str, object]) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_query_untrusted(**options)  # type: ignore[arg-type]
    assert 10 < len(caught.value.sentence) < 500


@settings(max_examples=500, deadline=None)
@given(
    st.text(alphabet="abz:/,!~=<>*?[]-09 \ud800\u241b", max_size=30),
    st.sampled_from(["", "name:", "size:", "last_modified:"]),
)
def test_grammar_raises_nothing_else(text: str, prefix: str) -> None:
    for parse in (parse_filter_untrusted, parse_orderby_untrusted):
        try:
            parse(prefix + text)
        except ProtocolError:
            continue


def test_patterns_cannot_be_made_slow(root: Root, tmp_path: Path) -> None:
    (tmp_path / "root" / ("a" * 250)).write_bytes(b"")
    started = time.monotonic()
    assert names(ls(root, "name:~" + "*a" * 200 + "*b", path=())) == []
    assert time.monotonic() - started < 2


def test_stat(root: Root) -> None:
    accounts = Accounts()
    entry = stat_entry(root, (b"data", b"b.txt"), accounts)
    assert (entry.name, entry.type, entry.size, entry.user) == ("b.txt", "file", 10, accounts.user(os.geteuid()))
    assert stat_entry(root, (), accounts).type == "dir"
    assert stat_entry(root, (b"data", b"to_dir"), accounts).link_target == "sub"
    assert stat_entry(root, (b"data", b"to_nothing"), accounts).type == "invalid_symlink"
    assert stat_entry(root, (b"data", b"to_dir"), accounts).type == "dir"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ((b"nothing",), "NOT_FOUND"),
        ((b"data", b"b.txt"), "NOT_A_DIRECTORY"),
        ((b"data", b"b.txt", b"x"), "NOT_A_DIRECTORY"),
        ((b"data", b"to_outside"), "PERMISSION_DENIED"),
        ((b"data", b"to_loop"), "SYMLINK_LOOP"),
        ((b"x" * 255 + b"y",), "ILLEGAL_NAME"),
    ],
)
def test_errors(root: Root, path: tuple[bytes, ...], code: str) -> None:
    with pytest.raises(ItemFailed) as caught:
        ls(root, path=path)
    assert caught.value.code == code
    if code == "NOT_FOUND":
        with pytest.raises(ItemFailed) as caught:
            stat_entry(root, path, Accounts())
        assert caught.value.code == code


def test_an_unmounted_root_is_not_listed_as_empty(root: Root, tmp_path: Path) -> None:
    (tmp_path / "root").rename(tmp_path / "gone")
    (tmp_path / "root").mkdir()
    for look in (lambda: ls(root), lambda: stat_entry(root, (b"data",), Accounts())):
        with pytest.raises(NeedsPerson):
            look()


def test_unknown_accounts_are_numbers() -> None:
    accounts = Accounts()
    assert accounts.user(3_999_999_999) == "3999999999"
    assert accounts.group(3_999_999_998) == "3999999998"
    assert accounts.user(0) == accounts.user(0) == "root"
    accounts.forget()
    assert accounts.group(0) in ("root", "wheel")


def test_odd_names_are_shown_escaped(root: Root, tmp_path: Path) -> None:
    for name in (b"\xff", b"a\nb", b"~"):
        (Path(os.fsdecode(os.fsencode(tmp_path / "root") + b"/" + name))).write_bytes(b"")
    assert names(ls(root, path=())) == ["a␛0Ab", "data", "~", "␛FF"]
    assert names(ls(root, "name:␛FF", path=())) == ["␛FF"]
    assert names(ls(root, "name:~␛*", path=())) == []
    assert names(ls(root, "name:~?", path=())) == ["~", "␛FF"]


def test_names_are_found_among_thousands_and_patterns_are_few(root: Root) -> None:
    """Each name in the folder is compared with every pattern; whoever may list could keep the agent busy for hours."""
    many = [f"name:{','.join(f'f{number:03}' for number in range(800))},c.dat"] * 32
    assert names(ls(root, *many)) == ["c.dat"]
    assert "c.dat" not in names(ls(root, f"name:{','.join(f'!f{number}' for number in range(600))},!c.dat"))
    assert names(ls(root, "name:" + ",".join(["~c.*"] * MAX_GLOBS))) == ["c.dat"]
    for too_many in (["name:" + ",".join(["~a"] * 101)], ["name:" + ",".join(["!~a"] * 60)] * 2):
        with pytest.raises(ProtocolError, match="100 patterns"):
            ls(root, *too_many)


def test_a_listing_ends_when_whoever_asked_has_given_up(root: Root) -> None:
    ticks = iter(range(0, 1000, 20))
    with pytest.raises(ItemFailed, match="within 60 seconds") as caught:
        list_directory(root, (b"data",), Query(), Accounts(), clock=lambda: float(next(ticks)))
    assert caught.value.code == "TOO_LARGE"

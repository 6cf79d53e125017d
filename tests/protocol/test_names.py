"""The escape of names and the checks of paths."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.names import (
    MAX_COMPONENTS,
    MAX_PATH,
    RESERVED_PREFIX,
    below_home,
    check_component_untrusted,
    escape,
    format_path,
    is_reserved,
    is_within,
    parse_path_untrusted,
    unescape,
)

# Pieces from which names are built that have broken other programs.
NASTY = [
    b"..",
    b".",
    b"~",
    b"/",
    b"\\",
    b"C:",
    b"\\\\server\\share",
    b"file:stream",
    b"::$DATA",
    b"CON",
    b"COM1 ",
    "COM¹".encode(),
    b"nul.txt",
    b"name.",
    b"name ",
    b" ",
    b"\0",
    b"\n",
    b"\x1b[2J",
    b"\x7f",
    b"\x85",
    "\u0085".encode(),
    "\u202e".encode(),
    "\u2066".encode(),
    "\u200d".encode(),
    "\ufeff".encode(),
    "\u2028".encode(),
    "\ufffe".encode(),
    "\U0010ffff".encode(),
    "\U000e0041".encode(),
    b"\xff",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    "é".encode(),
    "e\u0301".encode(),
    "\u241b".encode(),
    b"\xe2\x90",
    b"\x9b",
    b"41",
    b"4a",
    b"2F",
    b"2E",
    b"<script>",
    b"=cmd()",
    b"-rf",
    b"*",
]
nasty = st.lists(st.sampled_from(NASTY), max_size=6).map(b"".join)
any_name = st.one_of(st.binary(max_size=40), nasty, st.text(max_size=20).map(lambda text: text.encode()))
typed = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["\u241b", "4", "1", "F", "f", "a", "/", "~", ".."]), max_size=8).map("".join),
)
components = any_name.filter(lambda raw: 0 < len(raw) <= 255 and raw not in (b".", b"..") and not set(raw) & {0, 0x2F})
paths = st.lists(components, max_size=6).map(tuple)


@settings(max_examples=2000, deadline=None)
@given(any_name)
@example(b"\xe2\x90\x9b41")
@example(b"\xe2\x90\x9b\xe2\x90\x9b41")
@example(bytes(range(256)))
def test_every_name_comes_back(raw: bytes) -> None:
    text = escape(raw)
    assert unescape(text) == raw
    assert escape(unescape(text)) == text


@settings(max_examples=1000, deadline=None)
@given(typed)
def test_every_typed_text_means_something(text: str) -> None:
    raw = unescape(text)
    assert unescape(escape(raw)) == raw


@settings(max_examples=1000, deadline=None)
@given(any_name)
def test_escaped_text_is_safe_on_screens(raw: bytes) -> None:
    for character in escape(raw):
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_table_covers_what_this_python_knows() -> None:
    """The ranges are written out by hand; this is the whole of Unicode against them."""
    seen = 0
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        category = unicodedata.category(character)
        hidden = category in {"Cc", "Cf", "Zl", "Zp"} or number & 0xFFFE == 0xFFFE or 0xFDD0 <= number <= 0xFDEF
        if 0xD800 <= number <= 0xDFFF:
            continue
        shown = escape(character.encode())
        if hidden:
            seen += 1
            assert shown != character, f"U+{number:04X} passes"
        elif category[0] in "LNPS" and unicodedata.name(character, "").find("FILLER") < 0:
            assert shown == character, f"U+{number:04X} is escaped"
    assert seen > 200


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain.txt", "plain.txt"),
        ("Zürich 東京 🚀".encode(), "Zürich 東京 🚀"),
        (b"\xff", "␛FF"),
        (b"a\nb", "a␛0Ab"),
        ("a\u202eb".encode(), "a␛E2␛80␛AEb"),
        ("␛".encode(), "␛"),
        ("␛4a".encode(), "␛4a"),
        ("␛4A".encode(), "␛E2␛90␛9B4A"),
        (b"\xed\xa0\x80", "␛ED␛A0␛80"),
    ],
)
def test_spellings(raw: bytes, text: str) -> None:
    assert escape(raw) == text
    assert unescape(text) == raw


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ProtocolError):
        unescape("a\ud800b")
    with pytest.raises(ProtocolError):
        parse_path_untrusted("/a\udc80")


@pytest.mark.parametrize("raw", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"x" * 256])
def test_what_is_no_component(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_component_untrusted(raw)
    assert caught.value.code == "ILLEGAL_NAME"


@pytest.mark.parametrize("raw", [b"...", b"..a", b" ", b"~", b"C:", b"CON", b"x" * 255, b"\xff", b"a\\..\\b"])
def test_what_is_a_component(raw: bytes) -> None:
    assert check_component_untrusted(raw) == raw


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", (b"h", b"i")),
        ("~", (b"h", b"i")),
        ("~/", (b"h", b"i")),
        ("/~/", (b"h", b"i")),
        ("/~", (b"h", b"i")),
        ("/~/x", (b"h", b"i", b"x")),
        ("~/x/", (b"h", b"i", b"x")),
        ("x", (b"h", b"i", b"x")),
        ("./~/x", (b"h", b"i", b"~", b"x")),
        ("~user/x", (b"h", b"i", b"~user", b"x")),
        ("/", ()),
        ("//", ()),
        ("/x//y/", (b"x", b"y")),
        ("/x/./y", (b"x", b"y")),
        ("/x/../y", (b"y",)),
        ("/..", ()),
        ("/../../etc/passwd", (b"etc", b"passwd")),
        ("../../../x", (b"x",)),
        ("/~/../x", (b"h", b"x")),
        ("/a/~/x", (b"a", b"~", b"x")),
        ("/␛7E/x", (b"~", b"x")),
        ("/a␛FF", (b"a\xff",)),
        ("/...", (b"...",)),
        ("/a\\..\\b", (b"a\\..\\b",)),
    ],
)
def test_forms_of_paths(text: str, path: tuple[bytes, ...]) -> None:
    assert parse_path_untrusted(text, (b"h", b"i")) == path


@given(st.lists(st.sampled_from(["/", "~", "x", "\N{SYMBOL FOR ESCAPE}7E"]), max_size=8).map("".join))
def test_what_begins_at_home_leads_elsewhere_from_another_home(text: str) -> None:
    elsewhere = parse_path_untrusted(text, (b"h",)) != parse_path_untrusted(text, (b"other",))
    assert below_home(text) == elsewhere


@pytest.mark.parametrize(
    "text",
    [
        "/␛2E␛2E/x",
        "/␛2E",
        "/a␛2Fb",
        "/␛2F",
        "/a\0b",
        "/a␛00b",
        "/" + "x" * 256,
        "/" + "é" * 128,
        "/" + "x/" * (MAX_COMPONENTS + 1),
        "/" + ("x" * 250 + "/") * 17,
        "/" * (5 * MAX_PATH),
        "x\ud83d",
    ],
)
def test_refused_paths(text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_path_untrusted(text)
    assert caught.value.code == "ILLEGAL_NAME"
    assert len(caught.value.sentence) < 1000


def test_longest_accepted_path() -> None:
    path = (b"x" * 255,) * 16
    assert parse_path_untrusted(format_path(path)) == path
    deep = (b"x",) * MAX_COMPONENTS
    assert parse_path_untrusted(format_path(deep)) == deep
    odd = (b"\xff" * 255,) * 16
    assert parse_path_untrusted(format_path(odd)) == odd


def test_a_long_home_counts() -> None:
    with pytest.raises(ProtocolError):
        parse_path_untrusted("x" * 255, (b"y" * 250,) * 16)


@settings(max_examples=1000, deadline=None)
@given(paths, paths)
@example((b"~",), ())
@example((b"~", b"~"), (b"h",))
def test_paths_come_back_whatever_the_home(path: tuple[bytes, ...], home: tuple[bytes, ...]) -> None:
    assert parse_path_untrusted(format_path(path), home) == path
    assert parse_path_untrusted(format_path(path, directory=True), home) == path


@settings(max_examples=1500, deadline=None)
@given(st.one_of(typed, st.lists(nasty, max_size=8).map(lambda raws: "/".join(map(escape, raws))), st.text()))
def test_normalising_is_idempotent_and_yields_only_components(text: str) -> None:
    try:
        path = parse_path_untrusted(text, (b"home",))
    except ProtocolError:
        return
    assert parse_path_untrusted(format_path(path), (b"other",)) == path
    for name in path:
        assert check_component_untrusted(name) == name


@pytest.mark.parametrize(
    ("text", "path"), [("/../x", (b"x",)), ("a/../../..//x", (b"x",)), ("~/../../x", (b"x",)), ("/./..", ())]
)
def test_no_path_climbs_above_the_root(text: str, path: tuple[bytes, ...]) -> None:
    assert parse_path_untrusted(text) == path


def test_a_slash_cannot_be_written_as_an_escape() -> None:
    with pytest.raises(ProtocolError):
        parse_path_untrusted("..␛2F")


def test_within() -> None:
    assert is_within((b"a", b"b"), ())
    assert is_within((b"a",), (b"a",))
    assert not is_within((b"ab",), (b"a",))
    assert not is_within((), (b"a",))


def test_reserved_names() -> None:
    assert is_reserved(RESERVED_PREFIX + b"x")
    assert not is_reserved(b".towpath")


def test_a_long_name_costs_linear_time() -> None:
    raw = "␛4".encode() * 100_000
    assert unescape(escape(raw)) == raw

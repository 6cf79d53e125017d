"""Hostile bytes on control streams and lanes: only `ProtocolError` surfaces, memory is bounded."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocol import lane, session
from protocol.errors import ProtocolError
from protocol.names import check_component_untrusted
from protocol.session_checks import check_range_untrusted

VERSION = (1, 2, 3, 4, 5)

REQUESTS: list[session.Request] = [
    session.Hello("ticket", b"i" * 16),
    session.ListDirectory(1, b"a/b"),
    session.MoreRows(1),
    session.StatPaths(2, [b"", b"x"]),
    session.TakePaths(2, [b"", b"x"], 1, 3, 2, 10, 20),
    session.ReadRange(3, 0, b"f", VERSION, 0, 10, session.MIN_BLOCK),
    session.ReadPack(4, 0, b"d", [session.PackFile(b"f", VERSION)]),
    session.DigestFile(5, b"f", "SHA256", VERSION),
    session.Abandon(1),
    session.RenewTicket("ticket"),
    session.Ping(),
]
ANSWERS: list[session.Answer] = [
    session.HelloAnswer(),
    session.Rows(1, [session.Row(b"n", session.SYMLINK, 1, 2, 3, 4, 5, 0o644, b"target")], last=True),
    session.Stats(2, [session.StatResult(None, {"code": "NOT_FOUND"})]),
    session.Digest(5, "00"),
    session.Failed(0, {"code": "X"}),
    session.Pong(),
]
HEADERS: list[lane.AnyHeader] = [
    lane.LaneHello(b"i" * 16, 3),
    lane.LaneReady(),
    lane.Block(1, 2, b"d" * 32, last=True),
    lane.Pack(1, [lane.Packed(0, 1, b"d" * 32), lane.Packed(1, 0, b"", {"code": "X"})]),
    lane.ReadFailed(1, {"code": "X"}),
]
TAGS = ["hello", "list", "more", "stat", "read", "pack", "digest", "abandon", "renew", "ping"]
TAGS += ["welcome", "rows", "stats", "digested", "failed", "pong", "h", "y", "b", "p", "f"]

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=20) | st.text(max_size=20)
values = st.recursive(
    scalars | st.floats(), lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner)
)
fields = st.sampled_from(
    ["r", "lane", "path", "paths", "version", "offset", "length", "block", "rows", "error", "files"]
)
documents = st.dictionaries(fields, values, max_size=8).flatmap(
    lambda rest: st.sampled_from(TAGS).map(lambda tag: {"t": tag, **rest})
)
arrays = st.lists(values, max_size=6).flatmap(lambda rest: st.sampled_from(TAGS).map(lambda tag: [tag, *rest]))
packed = (documents | arrays | values).map(msgspec.msgpack.encode)
# Deep nesting must not exhaust the stack; half a document must not pass.
hostile = (
    st.binary(max_size=200)
    | packed
    | packed.map(lambda raw: raw[: len(raw) // 2])
    | st.integers(1, 5000).map(lambda depth: b"\x91" * depth)
)


def _framed(body: bytes) -> bytes:
    """What the reader takes for a whole message, so that not every conversation ends with its first bytes."""
    return len(body).to_bytes(session.PREFIX, "big") + body


def _body(message: session.Message) -> bytes:
    return session.encode(message)[session.PREFIX :]


DECODERS: list[Callable[[bytes | bytearray], object]] = [
    session.request_untrusted,
    session.answer_untrusted,
    lane.header_untrusted,
]


def _taken(body: bytes | bytearray) -> int:
    """How many take it for a message; the others refuse it, and nothing else is raised."""
    taken = 0
    for decode in DECODERS:
        with contextlib.suppress(ProtocolError):
            decode(body)
            taken += 1
    return taken


def test_hostile_bodies_raise_nothing_but_protocol_errors() -> None:
    outcomes: Counter[int] = Counter()

    @settings(max_examples=300, deadline=None)
    @given(hostile)
    @example(_body(session.Ping()))
    def decode(body: bytes) -> None:
        outcomes[_taken(body)] += 1

    decode()
    # No message is one of two kinds.
    assert outcomes.keys() == {0, 1}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*REQUESTS, *ANSWERS]), st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte_in_a_good_message_raises_nothing_else(message: Any, place: int, byte: int) -> None:
    body = bytearray(_body(message))
    body[place % len(body)] = byte
    assert _taken(body) <= 1


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_come_back_and_are_no_answers(message: session.Request) -> None:
    assert session.request_untrusted(_body(message)) == message
    with pytest.raises(ProtocolError):
        session.answer_untrusted(_body(message))


@pytest.mark.parametrize("message", ANSWERS, ids=lambda message: type(message).__name__)
def test_answers_come_back_and_are_no_requests(message: session.Answer) -> None:
    assert session.answer_untrusted(_body(message)) == message
    with pytest.raises(ProtocolError):
        session.request_untrusted(_body(message))


@pytest.mark.parametrize("message", [*REQUESTS, *ANSWERS], ids=lambda message: type(message).__name__)
@given(extra=values)
@settings(max_examples=20, deadline=None)
def test_what_newer_peers_add_to_messages_is_ignored(message: Any, extra: Any) -> None:
    document = {**msgspec.msgpack.decode(_body(message)), "added later": extra}
    decode: Any = session.request_untrusted if message in REQUESTS else session.answer_untrusted
    assert decode(msgspec.msgpack.encode(document)) == message


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: type(header).__name__)
@given(extra=values)
@settings(max_examples=20, deadline=None)
def test_what_newer_peers_add_to_headers_is_ignored(header: lane.AnyHeader, extra: Any) -> None:
    raw = lane.encode_header(header, 7)
    header_length, payload = lane.lengths_untrusted(raw[: lane.FRAME.size])
    body = raw[lane.FRAME.size :]
    assert (header_length, payload) == (len(body), 7)
    assert lane.header_untrusted(body) == header
    array = msgspec.msgpack.decode(body)
    assert len(array) == len(type(header).__struct_fields__) + 1
    assert lane.header_untrusted(msgspec.msgpack.encode([*array, extra])) == header


def test_rows_of_newer_peers_may_be_longer() -> None:
    row = [b"n", 0, 1, 2, 3, 4, 5, 6, None, 1, "added later", {"and": "more"}]
    body = msgspec.msgpack.encode({"t": "rows", "r": 1, "rows": [row]})
    answer = session.answer_untrusted(body)
    assert isinstance(answer, session.Rows)
    assert answer.rows == [session.Row(b"n", 0, 1, 2, 3, 4, 5, 6)]


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=lane.FRAME.size, max_size=lane.FRAME.size))
def test_frame_lengths_are_bounded(prefix: bytes) -> None:
    try:
        header, payload = lane.lengths_untrusted(prefix)
    except ProtocolError:
        header, payload = lane.FRAME.unpack(prefix)
        assert header == 0 or header > lane.MAX_HEADER or payload > session.MAX_BLOCK
    else:
        assert 0 < header <= lane.MAX_HEADER
        assert 0 <= payload <= session.MAX_BLOCK


@pytest.mark.parametrize(
    ("header", "payload", "good"),
    [
        (1, 0, True),
        (lane.MAX_HEADER, session.MAX_BLOCK, True),
        (0, 0, False),
        (lane.MAX_HEADER + 1, 0, False),
        (1, session.MAX_BLOCK + 1, False),
        (2**32 - 1, 2**32 - 1, False),
    ],
)
def test_frame_lengths_at_their_edges(header: int, payload: int, good: bool) -> None:
    prefix = lane.FRAME.pack(header, payload)
    if good:
        assert lane.lengths_untrusted(prefix) == (header, payload)
    else:
        with pytest.raises(ProtocolError):
            lane.lengths_untrusted(prefix)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=12), st.lists(st.integers(1, 400), min_size=1, max_size=40))
def test_the_reader_does_not_care_how_a_stream_is_cut(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(len(body).to_bytes(session.PREFIX, "big") + body for body in bodies)
    reader, found, place, turn = session.MessageReader(), [], 0, 0
    while place < len(stream):
        step = cuts[turn % len(cuts)]
        found += reader.feed_untrusted(stream[place : place + step])
        place, turn = place + step, turn + 1
        assert reader.pending <= session.PREFIX + 300
    assert found == bodies
    assert reader.pending == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=100) | st.binary(max_size=300).map(_framed), max_size=20))
def test_the_reader_holds_no_more_than_one_message_and_what_came(chunks: list[bytes]) -> None:
    reader, fed = session.MessageReader(), 0
    try:
        for chunk in chunks:
            fed += len(chunk)
            taken = reader.feed_untrusted(chunk)
            fed -= sum(len(body) + session.PREFIX for body in taken)
            assert reader.pending == fed
            assert reader.pending < session.PREFIX + session.MAX_MESSAGE
    except ProtocolError:
        pass


@pytest.mark.parametrize("length", [session.MAX_MESSAGE + 1, 2**31, 2**32 - 1])
def test_an_impossible_length_is_refused_before_anything_of_it_is_kept(length: int) -> None:
    with pytest.raises(ProtocolError):
        session.MessageReader().feed_untrusted(length.to_bytes(session.PREFIX, "big"))


def test_the_largest_message_passes() -> None:
    reader = session.MessageReader()
    assert reader.feed_untrusted(session.MAX_MESSAGE.to_bytes(session.PREFIX, "big")) == []
    half = bytes(session.MAX_MESSAGE // 2)
    assert reader.feed_untrusted(half) == []
    assert [len(body) for body in reader.feed_untrusted(half)] == [session.MAX_MESSAGE]


@pytest.mark.parametrize(
    ("offset", "length", "block", "size"),
    [
        (-1, 1, session.MIN_BLOCK, 10),
        (-(2**63), 2**62, session.MIN_BLOCK, 10),
        (0, 0, session.MIN_BLOCK, 10),
        (0, -1, session.MIN_BLOCK, 10),
        (0, 11, session.MIN_BLOCK, 10),
        (10, 1, session.MIN_BLOCK, 10),
        (2**63, 1, session.MIN_BLOCK, 10),
        (2**63 - 1, 1, session.MIN_BLOCK, 2**62),
        (0, 1, session.MIN_BLOCK, -1),
        (0, session.MAX_RANGE + 1, session.MIN_BLOCK, 2**40),
        (0, 1, session.MIN_BLOCK - 1, 10),
        (0, 1, 0, 10),
        (0, 1, -session.MIN_BLOCK, 10),
        (0, 1, session.MAX_BLOCK + 1, 10),
        (0, 1, 2**63, 10),
    ],
)
def test_ranges_no_honest_peer_asks_for(offset: int, length: int, block: int, size: int) -> None:
    request = session.ReadRange(1, 0, b"f", (1, 2, size, 4, 5), offset, length, block)
    with pytest.raises(ProtocolError):
        check_range_untrusted(session.request_untrusted(_body(request)))  # type: ignore[arg-type]


@given(st.integers(-(2**63), 2**63), st.integers(-(2**63), 2**63), st.integers(0, 2**63 - 1))
def test_a_range_that_passes_lies_within_the_file(offset: int, length: int, size: int) -> None:
    request = session.ReadRange(1, 0, b"f", (1, 2, size, 4, 5), offset, length, session.MIN_BLOCK)
    inside = offset >= 0 and 0 < length <= session.MAX_RANGE and offset + length <= size
    if inside:
        check_range_untrusted(request)
    else:
        with pytest.raises(ProtocolError):
            check_range_untrusted(request)


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.lists(st.sampled_from([b"..", b".", b"", b"a", b"\0"]), max_size=6).map(b"/".join))
def test_a_path_that_passes_holds_only_good_components(raw: bytes) -> None:
    try:
        path = session.path_untrusted(raw)
    except ProtocolError:
        return
    assert session.join_path(path) == raw
    for component in path:
        assert component not in (b"", b".", b"..")
        assert b"/" not in component
        assert b"\0" not in component
        check_component_untrusted(component)


@pytest.mark.parametrize(
    "raw", [b"..", b"a/../b", b"/a", b"a//b", b"a/", b"./a", b"a\0b", b"x" * session.MAX_PATH + b"y"]
)
def test_paths_that_lead_elsewhere_are_refused(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        session.path_untrusted(raw)


@pytest.mark.parametrize("raw", [b".towpath.x", b"a/.towpath.11111111.x"])
def test_names_of_the_agents_own_are_refused_in_words(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"begin with \.towpath\. are the agent's own") as caught:
        session.path_untrusted(raw)
    assert caught.value.code == "ILLEGAL_NAME"

"""The byte stream inside WebSocket without I/O: however it is cut, the same bytes arrive; what is hostile ends."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.websocket.core import FEED, MAX_MESSAGE, Core, WebSocketRefused
from protocol.websocket.paths import LINK_PATH, PATHS, TUNNEL_PATH

REQUEST = (
    b"GET " + LINK_PATH.encode() + b" HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: towpath-stream.1\r\n"
)


def opened(path: str = LINK_PATH) -> tuple[Core, Core]:
    client, server = Core.client("relay", 443, path, 0), Core.server(PATHS, 0)
    server.receive_untrusted(client.take(), 0)
    client.receive_untrusted(server.take(), 0)
    assert client.is_open
    assert server.is_open
    return client, server


def feed(core: Core, data: bytes, piece: int = FEED) -> None:
    for start in range(0, len(data), piece):
        core.receive_untrusted(data[start : start + piece], 0)


def frame(opcode: int, payload: bytes, *, fin: bool = True, length: int | None = None) -> bytes:
    """A client's frame; its mask is zero."""
    size = len(payload) if length is None else length
    head = bytes([opcode | (0x80 if fin else 0)])
    head += bytes([0x80 | size]) if size < 126 else bytes([0xFF]) + struct.pack(">Q", size)
    return head + bytes(4) + payload


@given(st.lists(st.binary(max_size=300_000), max_size=4), st.integers(1, FEED), st.booleans())
def test_what_is_sent_arrives(parts: list[bytes], piece: int, from_client: bool) -> None:
    client, server = opened(TUNNEL_PATH)
    sender, receiver = (client, server) if from_client else (server, client)
    for part in parts:
        sender.send(part)
    sender.end()
    data = sender.take()
    feed(receiver, data, max(piece, len(data) // 50 + 1, 1))
    assert b"".join(receiver.incoming) == b"".join(parts)
    assert receiver.peer_ended
    # The other direction is open still.
    receiver.send(b"answer")
    feed(sender, receiver.take())
    assert b"".join(sender.incoming) == b"answer"
    assert not sender.peer_ended


@given(st.binary(max_size=2000))
def test_any_bytes_at_all_are_taken_or_refused(data: bytes) -> None:
    for core in (Core.server(PATHS, 0), opened()[1], opened()[0], Core.client("relay", 443, LINK_PATH, 0)):
        try:
            feed(core, data)
            core.receive_untrusted(b"", 0)
        except (ProtocolError, WebSocketRefused) as error:
            assert error.sentence.endswith(".")
        core.take()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (b"Origin: https://page.example\r\n", b"403"),
        (b"Origin: null\r\n", b"403"),
        (b"X-Fill: " + b"x" * 20_000 + b"\r\n", b""),
        (b"X: y\r\n" * 500, b""),
    ],
)
def test_pages_of_browsers_and_endless_requests_are_refused(change: bytes, status: bytes) -> None:
    core = Core.server(PATHS, 0)
    with pytest.raises(ProtocolError):
        feed(core, REQUEST + change + b"\r\n")
    assert status in core.take()
    assert not core.is_open


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (LINK_PATH.encode(), b"/towpath/v1/websocket/else", b"404"),
        (b"towpath-stream.1", b"chat", b"400"),
        (b"Sec-WebSocket-Protocol", b"X-Other", b"400"),
        (b"GET", b"POST", b""),
        (b"Version: 13", b"Version: 8", b"400"),
    ],
)
def test_other_requests_are_refused(old: bytes, new: bytes, status: bytes) -> None:
    core = Core.server(PATHS, 0)
    with pytest.raises(ProtocolError):
        feed(core, REQUEST.replace(old, new) + b"\r\n")
    assert status in core.take()
    assert not core.is_open


def test_the_request_of_the_test_itself_is_good() -> None:
    core = Core.server(PATHS, 0)
    feed(core, REQUEST + b"\r\n")
    assert core.is_open


@pytest.mark.parametrize(
    "data",
    [
        frame(2, b"", length=MAX_MESSAGE + 1),
        frame(2, b"", length=2**62),
        frame(2, bytes(1000), fin=False) + frame(0, b"", fin=False, length=MAX_MESSAGE + 1),
        frame(2, b"a", fin=False) + frame(2, b"b"),
        frame(2, b"a", fin=False) + frame(1, b"end"),
        frame(2, b"a") + frame(0, b"b"),
        frame(1, b"en", fin=False) + frame(0, b"d"),
        frame(9, b"a", fin=False),
        frame(0, b"out of nowhere"),
        frame(1, b"other words"),
        frame(1, b"end") + frame(2, b"behind the end"),
        frame(1, b"end") + frame(1, b"end"),
        frame(9, bytes(125)) * 0 + b"\x89\xfe\x00\x7e" + bytes(4) + bytes(126),
        b"\xc2\x80" + bytes(4),
        b"\x82\x05hello",
    ],
)
def test_hostile_frames_end_the_connection(data: bytes) -> None:
    _, server = opened()
    with pytest.raises(ProtocolError):
        feed(server, data)
        raise AssertionError("it was taken")


@given(st.lists(st.binary(max_size=9), min_size=1, max_size=6), st.integers(1, 40))
def test_fragments_with_something_in_between_are_one_stream(parts: list[bytes], piece: int) -> None:
    """As something on the way may cut them."""
    _, server = opened()
    data = b""
    for number, part in enumerate(parts):
        data += frame(0 if number else 2, part, fin=number == len(parts) - 1) + frame(9, b"there?")
    feed(server, data, piece)
    assert b"".join(server.incoming) == b"".join(parts)
    assert server.take() == (b"\x8a\x06there?") * len(parts)


@pytest.mark.parametrize("one", [frame(9, b""), frame(2, b""), frame(10, b"x"), frame(2, b"x")])
def test_a_flood_of_frames_ends_the_connection_and_makes_no_more_of_itself(one: bytes) -> None:
    _, server = opened()
    fed, answered = 0, 0
    with pytest.raises(ProtocolError, match="floods"):
        for _ in range(100):
            fed += FEED
            server.receive_untrusted(one * (FEED // len(one)), 0)
            answered += len(server.take())
    assert answered <= fed
    assert fed < 5 * FEED


def test_an_answer_that_is_no_websocket() -> None:
    for answer, words in (
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "502"),
        (b"SSH-2.0-OpenSSH_9\r\n", "HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n<html>hello ", "200"),
    ):
        client = Core.client("relay", 443, LINK_PATH, 0)
        client.take()
        with pytest.raises(WebSocketRefused, match=words):
            client.receive_untrusted(answer, 0)

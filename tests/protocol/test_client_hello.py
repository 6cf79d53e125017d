"""Reading a TLS greeting from the outside: right for every real one, calm about every other."""

from __future__ import annotations

import ssl
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.client_hello import MAX_CLIENT_HELLO, ClientHello, NotTLS, parse_client_hello_untrusted
from protocol.errors import ProtocolError


def greeting(server_name: str | None = "relay.example", alpn: tuple[str, ...] = ("towpath-link/1",)) -> bytes:
    """What a real TLS client sends first."""
    context = ssl.create_default_context()
    context.check_hostname = server_name is not None
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=server_name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


REAL = greeting()


def in_records(data: bytes, size: int) -> bytes:
    """The same handshake message, spread over records of ``size`` bytes."""
    message = data[5:]
    pieces = [message[n : n + size] for n in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("alpn", [(), ("h2", "http/1.1"), ("towpath-link/1",), ("a" * 255,)])
@pytest.mark.parametrize("name", [None, "relay.example", "UPPER.example", "a.b-c.d_e.example"])
def test_real_greetings_are_read(name: str | None, alpn: tuple[str, ...]) -> None:
    expected = None if name is None else name.lower()
    assert parse_client_hello_untrusted(greeting(name, alpn)) == ClientHello(expected, alpn)


def test_what_follows_the_greeting_does_not_matter() -> None:
    assert parse_client_hello_untrusted(REAL + b"\x17\x03\x03\0\x01x") == parse_client_hello_untrusted(REAL)


def test_every_beginning_of_a_greeting_asks_for_more() -> None:
    for size in range(len(REAL)):
        assert parse_client_hello_untrusted(REAL[:size]) is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 200])
def test_a_greeting_spread_over_many_records_is_read(size: int) -> None:
    spread = in_records(REAL, size)
    assert parse_client_hello_untrusted(spread) == parse_client_hello_untrusted(REAL)
    assert parse_client_hello_untrusted(spread[:-1]) is None


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"SSH-2.0-x\r\n", b"\0", b"\x80\x2e\x01", b"\x16\x02\x01"])
def test_what_is_not_tls_is_told_apart_at_once(data: bytes) -> None:
    with pytest.raises(NotTLS):
        parse_client_hello_untrusted(data)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\x16\x03\x01\x00\x00", "length"),
        (b"\x16\x03\x01\xff\xff", "length"),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "not a ClientHello"),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "too long"),
        (b"\x16\x03\x01\x00\x02\x01\x00" + b"\x17\x03\x01\x00\x02\x00\x05", "another record"),
        (b"\x16\x03\x01\x00\x09\x01\x00\x00\x05\x03\x03\x00\x00\x00", "malformed"),
    ],
)
def test_malformed_greetings_are_refused(data: bytes, word: str) -> None:
    with pytest.raises(ProtocolError, match=word):
        parse_client_hello_untrusted(data)


def hello_with(extensions: bytes) -> bytes:
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0"
    body += len(extensions).to_bytes(2, "big") + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + len(message).to_bytes(2, "big") + message


def server_name(name: bytes) -> bytes:
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    names = len(entry).to_bytes(2, "big") + entry
    return b"\0\0" + len(names).to_bytes(2, "big") + names


@pytest.mark.parametrize("name", [b"", b"a b", b"a/../b", b"a\0b", b"\xff", b"-a", b"x" * 300, b"a\nb"])
def test_a_server_name_that_is_none_is_refused(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_client_hello_untrusted(hello_with(server_name(name)))


def test_an_extension_given_twice_is_refused() -> None:
    assert parse_client_hello_untrusted(hello_with(server_name(b"a"))) == ClientHello("a", ())
    with pytest.raises(ProtocolError, match="repeats"):
        parse_client_hello_untrusted(hello_with(server_name(b"a") + server_name(b"b")))


def outcome_of(data: bytes) -> str:
    """One of three; anything else is raised."""
    try:
        hello = parse_client_hello_untrusted(data)
    except ProtocolError:
        return "refused"
    assert hello is None or isinstance(hello, ClientHello)
    return "more" if hello is None else "read"


def test_random_bytes_raise_nothing_but_protocol_errors() -> None:
    outcomes: Counter[str] = Counter()

    @given(st.binary(max_size=600))
    @settings(max_examples=500, deadline=None)
    def parse(data: bytes) -> None:
        starts = (b"", b"\x16\x03\x01", b"\x16\x03\x01\x00\x80\x01\x00\x00\x7c")
        outcomes.update(outcome_of(start + data) for start in starts)

    parse()
    # The last start asks for more until there are 124 bytes.
    assert outcomes["refused"]
    assert outcomes["more"]


def test_damaged_greetings_raise_nothing_but_protocol_errors() -> None:
    outcomes: Counter[str] = Counter()

    @given(st.data())
    @settings(max_examples=500, deadline=None)
    def parse(data: st.DataObject) -> None:
        damaged = bytearray(REAL)
        for _ in range(data.draw(st.integers(1, 6))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
        outcomes[outcome_of(bytes(damaged))] += 1

    parse()
    # Most of a greeting is random and keys.
    assert outcomes["refused"]
    assert outcomes["read"]


def test_a_greeting_never_needs_more_than_the_bound() -> None:
    """Whoever sends bytes for ever is told off, not listened to for ever."""
    endless = in_records(b"\0\0\0\0\0" + b"\x01\x00\x40\x00" + bytes(MAX_CLIENT_HELLO), 1)
    assert len(endless) > MAX_CLIENT_HELLO
    assert parse_client_hello_untrusted(endless[:MAX_CLIENT_HELLO]) is None

"""Both libraries behind the TLS of WebSocket lines do the same, against a client of Python's own."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from protocol.websocket.server_tls import ServerContext
from protocol.websocket.tls import Tls
from tests.protocol.server_ends import library, opened

CA = trustme.CA()
LEAF = CA.issue_cert("relay")
CONTENT = random.Random(1).randbytes(700_001)


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    LEAF.private_key_and_cert_chain_pem.write_to_path(path)
    return path


Made = Callable[[Path], Tls]
both = pytest.mark.parametrize("made", [library, opened])


class Client:
    """The other end, in memory."""

    def __init__(self, most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        context = ssl.create_default_context()
        CA.configure_trust(context)
        context.maximum_version = most
        context.set_alpn_protocols(["http/1.1", "http/1.0"])
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="relay")

    def said(self) -> bytes:
        return self.outgoing.read()


def shaken(server: Tls, client: Client) -> None:
    for _ in range(4):
        for step in (client.tls.do_handshake, server.shake_hands):
            try:
                step()
            except ssl.SSLWantReadError:
                pass
            if said := client.said():
                server.take_in(said)
            client.incoming.write(server.take_out())


def received(server: Tls, size: int) -> bytes:
    view = memoryview(bytearray(size))
    done = 0
    while done < size:
        more = server.read_into(view[done : done + 100_000])
        assert more
        done += more
    return bytes(view)


@both
@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2])
def test_content_goes_both_ways(made: Made, most: ssl.TLSVersion, pem: Path) -> None:
    server, client = made(pem), Client(most)
    shaken(server, client)
    assert client.tls.version() == ("TLSv1.3" if most is ssl.TLSVersion.TLSv1_3 else "TLSv1.2")
    cipher = client.tls.cipher()
    assert cipher is not None
    assert "GCM" in cipher[0] or "CHACHA20" in cipher[0]
    client.tls.write(CONTENT)
    said = client.said()
    # In pieces that end in the middle of records.
    taken = b""
    view = memoryview(bytearray(64 * 1024))
    for start in range(0, len(said), 50_000):
        server.take_in(said[start : start + 50_000])
        while True:
            try:
                size = server.read_into(view)
            except ssl.SSLWantReadError:
                break
            taken += bytes(view[:size])
    assert taken == CONTENT
    server.write(memoryview(CONTENT))
    client.incoming.write(server.take_out())
    assert server.take_out() == b""
    back = b""
    while len(back) < len(CONTENT):
        back += client.tls.read(100_000)
    assert back == CONTENT


@both
def test_what_came_before_the_end_comes_before_the_end(made: Made, pem: Path) -> None:
    for goodbye in (False, True):
        server, client = made(pem), Client()
        shaken(server, client)
        client.tls.write(b"last words")
        if goodbye:
            with pytest.raises(ssl.SSLWantReadError):
                client.tls.unwrap()
        server.take_in(client.said())
        server.take_in(b"")
        view = memoryview(bytearray(1000))
        size = server.read_into(view)
        assert bytes(view[:size]) == b"last words"
        assert server.read_into(view) == server.read_into(view) == 0


@both
def test_damage_breaks_one_connection_and_no_other(made: Made, pem: Path) -> None:
    server, client = made(pem), Client()
    other, guest = made(pem), Client()
    shaken(server, client)
    shaken(other, guest)
    client.tls.write(b"content")
    guest.tls.write(b"content")
    damaged = bytearray(client.said())
    damaged[-1] ^= 1
    server.take_in(damaged)
    with pytest.raises(ssl.SSLError) as caught:
        server.read_into(memoryview(bytearray(100)))
    assert not isinstance(caught.value, ssl.SSLWantReadError)
    # The other side is told so.
    assert server.take_out()
    other.take_in(guest.said())
    assert received(other, 7) == b"content"


@both
def test_what_is_no_tls_or_too_old_or_ends_is_refused(made: Made, pem: Path) -> None:
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b""):
        server = made(pem)
        server.take_in(said)
        with pytest.raises(ssl.SSLError) as caught:
            server.shake_hands()
        assert not isinstance(caught.value, ssl.SSLWantReadError)


def test_certificate_and_key_must_belong_together(tmp_path: Path, pem: Path) -> None:
    other = tmp_path / "other.key"
    CA.issue_cert("other").private_key_pem.write_to_path(other)
    with pytest.raises(ssl.SSLError):
        ServerContext(str(pem), str(other))
    with pytest.raises((ssl.SSLError, OSError)):
        ServerContext(str(tmp_path / "nothing.pem"), None)

"""A stranger who has TLS do work, and says nothing, holds up nobody and has nothing kept for him."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from protocol.websocket import secured as module
from protocol.websocket.secured import READ, Secured
from tests.protocol.key_updates import KeyUpdates
from tests.protocol.server_ends import library, opened

CA = trustme.CA()
LEAF = CA.issue_cert("relay")
# As much as comes in one segment of a network, about.
PIECE = 1400


class Pieces:
    """A socket on which these come, one with each call, and that takes nothing after the handshake."""

    def __init__(self) -> None:
        self.coming: Iterator[bytes] = iter(())
        self.said = b""
        self.deaf = False
        self.came = 0

    def setblocking(self, _blocking: bool) -> None:
        """It never does."""

    def recv_into(self, buffer: memoryview) -> int:
        piece = next(self.coming, None)
        if piece is None:
            raise BlockingIOError
        self.came += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)

    def send(self, data: bytes) -> int:
        if self.deaf:
            raise BlockingIOError
        self.said += data
        return len(data)

    def sendmsg(self, parts: list[bytes]) -> int:
        return self.send(b"".join(parts))


@pytest.fixture(params=[library, opened])
def secured(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Secured, Pieces, KeyUpdates]:
    """A server whose handshake is done, and who goes on at the client's end."""
    pem, log = tmp_path / "server.pem", tmp_path / "keys"
    LEAF.private_key_and_cert_chain_pem.write_to_path(pem)
    sock: Any = Pieces()
    server = Secured(sock, request.param(pem), buffer=memoryview(bytearray(READ)))
    context = ssl.create_default_context()
    CA.configure_trust(context)
    context.keylog_filename = str(log)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname="relay")
    for done in (False, True):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            assert not done
        sock.coming, server.readable = iter([outgoing.read()]), True
        assert server.shake_hands() == done
        incoming.write(sock.said)
    cipher = client.cipher()
    assert cipher is not None
    return server, sock, KeyUpdates(log, "CLIENT", cipher[0])


def pieces(records: Iterator[bytes], most: int) -> Iterator[bytes]:
    while most > 0:
        piece = b""
        while len(piece) < PIECE:
            piece += next(records)
        most -= len(piece)
        yield piece


def test_endless_changes_of_keys_end_the_connection_soon(secured: tuple[Secured, Pieces, KeyUpdates]) -> None:
    server, sock, keys = secured
    before = sock.came
    sock.coming, server.readable = pieces(iter(keys.update, b""), 500_000), True
    with pytest.raises(ssl.SSLError):
        server.receive_into(memoryview(bytearray(1000)))
    assert sock.came - before < 2 * module._MOST_OTHER


def test_who_asks_and_takes_no_answers_has_little_kept_for_him(
    secured: tuple[Secured, Pieces, KeyUpdates], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_UNSENT", 20_000)
    server, sock, keys = secured
    sock.deaf = True
    view = memoryview(bytearray(100))

    def asking() -> Iterator[bytes]:
        while True:
            yield keys.update()
            yield keys.content(b"content")

    sock.coming, server.readable = pieces(asking(), 200_000), True
    kept = 0
    with pytest.raises(ssl.SSLError):
        while server.receive_into(view) is not None:
            assert kept <= server.unsent_bytes == sum(map(len, server._unsent))
            kept = server.unsent_bytes
    assert 10_000 < kept <= 20_000


def test_a_change_of_keys_now_and_then_is_answered(secured: tuple[Secured, Pieces, KeyUpdates]) -> None:
    server, sock, keys = secured
    view = memoryview(bytearray(100_000))
    sock.said = b""
    for number in range(1, 301):
        record = keys.update() + keys.content(bytes(20))
        # Byte by byte, as on the worst of networks.
        sock.coming, server.readable = iter([record[at : at + 1] for at in range(len(record))]), True
        assert server.receive_into(view) == 20
        # OpenSSL gives the last one with what it does next.
        assert len(sock.said) >= 27 * (number - 1)
    assert server.unsent_bytes == 0

"""Two carriers of one QUIC connection in one thread, over real sockets of loopback or a lossy middle."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from agent.connect.quic import carrier as carrier_module
from agent.connect.quic.carrier import Carrier, ConnectionOver
from agent.connect.quic.datagrams import Datagrams
from agent.connect.quic.engine import KEY_PACKETS, Engine
from agent.connect.quic.introduction import ClientIntroduction, ServerIntroduction
from protocol.identity import NodeKey

SESSION = "22222222-2222-4222-8222-222222222222"
CLIENT, SERVER = NodeKey.generate(), NodeKey.generate()
LIBRARIES = ["qh3", "aioquic"]
both = pytest.mark.parametrize("library", LIBRARIES)
# Client and server, in that order or the other one.
all_four = pytest.mark.parametrize(("library", "other"), [(a, b) for a in LIBRARIES for b in LIBRARIES])


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def engine(identity: NodeKey, library: str, *, is_client: bool, key_packets: int = KEY_PACKETS) -> Engine:
    return Engine(
        is_client=is_client,
        certificate_pem=identity.certificate_pem,
        private_key_pem=identity.private_key_pem,
        library=library,
        key_packets=key_packets,
    )


class Lossy(Datagrams):
    """Loses, doubles and reorders a share of what is sent."""

    def __init__(self, sock: socket.socket, seed: int, share: float) -> None:
        super().__init__(sock)
        self._chance = random.Random(seed)
        self._share = share

    def send(self, datagrams):  # type: ignore[no-untyped-def]
        kept = []
        for datagram in datagrams:
            draw = self._chance.random()
            if draw > self._share:
                kept.append(datagram)
            if draw > 1 - self._share / 2:
                kept.append(datagram)
            if len(kept) > 1 and draw > 1 - self._share:
                kept[-1], kept[-2] = kept[-2], kept[-1]
        return super().send(kept)


@dataclass
class QuicPair:
    """Client and server; `run` turns both until a condition holds. ``streams`` are the server's ends."""

    client: Carrier
    server: Carrier
    streams: list[socket.socket] = field(default_factory=list)
    ups: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)

    def run(self, until: Callable[[], bool], turns: int = 20_000) -> None:
        for _ in range(turns):
            if until():
                return
            for carrier in (self.client, self.server):
                try:
                    carrier.turn(0.002)
                except ConnectionOver as error:
                    self.over.append(error.sentence)
                    if len(self.over) > 10 and not until():
                        raise AssertionError(f"it is over: {error.sentence}") from error
        raise AssertionError("it did not come to an end")

    def up(self) -> None:
        self.run(lambda: len(self.ups) == 2)

    def open(self) -> tuple[socket.socket, socket.socket]:
        before = len(self.streams)
        near = self.client.open_stream()
        self.run(lambda: len(self.streams) > before)
        for end in (near, self.streams[-1]):
            end.setblocking(False)
        return near, self.streams[-1]

    def close(self) -> None:
        for carrier in (self.client, self.server):
            carrier.close("done")
        for stream in self.streams:
            stream.close()


def quic_pair(
    library: str,
    *,
    server_library: str | None = None,
    client_identity: NodeKey = CLIENT,
    server_identity: NodeKey = SERVER,
    session: str = SESSION,
    loss: float = 0.0,
    seed: int = 0,
    make: Callable[[], socket.socket] = udp,
    host: str = "127.0.0.1",
    key_packets: int = KEY_PACKETS,
    instance: str = "",
) -> QuicPair:
    """A pair that has begun its handshake. The client expects `SERVER` and the server `CLIENT`, in `SESSION`."""
    a, b = make(), make()
    address = (host, b.getsockname()[1])
    first, second = (Lossy(a, seed, loss), Lossy(b, seed + 1, loss)) if loss else (Datagrams(a), Datagrams(b))
    made: QuicPair

    made = QuicPair(
        Carrier(
            engine(client_identity, library, is_client=True, key_packets=key_packets),
            first,
            ClientIntroduction(session, client_identity, SERVER.certificate_pem),
            lambda: made.ups.append("client"),
            lambda _sock: None,
        ),
        Carrier(
            engine(server_identity, server_library or library, is_client=False, key_packets=key_packets),
            second,
            ServerIntroduction(SESSION, server_identity, CLIENT.certificate_pem, instance),
            lambda: made.ups.append("server"),
            lambda sock: made.streams.append(sock),
        ),
    )
    made.client.connect(address)
    return made


def move_bytes(pair: QuicPair, source: socket.socket, target: socket.socket, content: bytes) -> bytes:
    """Send all of it and the end, until the other side has both."""
    received = bytearray()
    view = memoryview(content)
    ended = False

    def done() -> bool:
        nonlocal view, ended
        with suppress(BlockingIOError):
            while view:
                view = view[source.send(view[: 256 * 1024]) :]
                if not view:
                    source.shutdown(socket.SHUT_WR)
        with suppress(BlockingIOError):
            while piece := target.recv(1 << 20):
                received.extend(piece)
            ended = True
        return ended

    pair.run(done)
    return bytes(received)


def soon_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a client that doubts whether its server is there decide within half a second."""
    for name, value in (("ASK_AGAIN", 0.02), ("DOUBT_PATIENCE", 0.1), ("DOUBTED_SILENCE", 0.4)):
        monkeypatch.setattr(carrier_module, name, value)

"""Datagrams with which a QUIC server is flooded, and a handshake that has to get through."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from aioquic.buffer import Buffer
from aioquic.tls import Context, Epoch

from agent.connect.quic.engine import Engine, Up
from tests.agent.quic_pair import CLIENT, SERVER, engine

PEER, STRANGER = ("192.0.2.1", 4000), ("192.0.2.66", 6666)
HOST = ("192.0.2.2", 5000)
MIB = 2**20
# Seconds.
TRIP = 0.1

Datagram = tuple[bytes, tuple[str, int]]


def initial(chance: random.Random, *, version: int = 1, length: int = 1200, cid: int = 8, first: int = 0xC3) -> bytes:
    """Looks like an Initial packet, and says nothing that can be decrypted."""
    head = bytes([first]) + version.to_bytes(4, "big") + bytes([cid]) + chance.randbytes(cid)
    head += bytes([8]) + chance.randbytes(8) + b"\x00" + (0x4000 | 1160).to_bytes(2, "big")
    return head + chance.randbytes(max(0, length - len(head)))


def real_initial() -> bytes:
    """The first datagram of a client that nobody knows."""
    stranger = engine(CLIENT, "aioquic", is_client=True)
    stranger.connect(HOST, 0.0)
    return stranger.datagrams(0.0)[0][0]


def broken_hello() -> bytes:
    """A well encrypted Initial packet with a greeting that TLS cannot make anything of."""
    stranger = engine(CLIENT, "aioquic", is_client=True)
    sent = Context.handle_message
    try:

        def greet(_self: object, _data: bytes, buffers: dict[object, Buffer]) -> None:
            buffers[Epoch.INITIAL].push_bytes(b"\x01\x00\x00\x04\xff\xff\xff\xff")

        Context.handle_message = greet  # type: ignore[method-assign,assignment]
        stranger.connect(HOST, 0.0)
    finally:
        Context.handle_message = sent  # type: ignore[method-assign]
    return stranger.datagrams(0.0)[0][0]


def guarded(library: str) -> Engine:
    """A server that knows where its peer was found."""
    return Engine(
        is_client=False,
        certificate_pem=SERVER.certificate_pem,
        private_key_pem=SERVER.private_key_pem,
        library=library,
        known=(PEER,),
    )


def shake_hands(
    client: Engine, server: Engine, flood: Callable[[int], Iterable[Datagram]], trips: int = 20
) -> tuple[int, int, int]:
    """Until both are up, in a world where half a round trip takes as long as it takes: round trips that took, bytes
    of the flood, bytes that the server sent to anybody."""
    up: set[str] = set()
    flooded = answered = 0
    client.connect(HOST, 0.0)
    for trip in range(1, trips + 1):
        now = trip * TRIP
        for data, address in flood(trip):
            flooded += len(data)
            server.receive(data, 0, address, now)
        for end in (client, server):
            timer = end.timer()
            if timer is not None and timer <= now:
                end.handle_timer(now)
        for data, _ in client.datagrams(now):
            server.receive(data, 0, PEER, now)
        up |= {"server" for event in server.events() if isinstance(event, Up)}
        for data, address in server.datagrams(now):
            answered += len(data)
            if address == PEER:
                client.receive(data, 0, HOST, now)
        up |= {"client" for event in client.events() if isinstance(event, Up)}
        if len(up) == 2:
            return trip, flooded, answered
    raise AssertionError(f"no handshake within {trips} round trips: {up or 'nobody'} is up, {server.door.statistics()}")

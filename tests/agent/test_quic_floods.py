"""Floods at the UDP port of a QUIC server, with both libraries: the peer still gets in, and nothing piles up.

The attackers here know the port, and where they have to the peer's address too, which they put on their datagrams. What
they cannot do is read what is sent to that address.
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterable
from contextlib import closing

import psutil
import pytest
from aioquic.quic.packet import encode_quic_version_negotiation

from agent.connect.quic import carrier as carrier_module
from agent.connect.quic.carrier import ConnectionOver
from tests.agent.quic_flood import (
    MIB,
    PEER,
    STRANGER,
    Datagram,
    broken_hello,
    guarded,
    initial,
    real_initial,
    shake_hands,
)
from tests.agent.quic_pair import CLIENT, all_four, both, engine, quic_pair, soon_in_doubt, udp


@all_four
def test_without_a_flood_nobody_has_to_try_again(library: str, other: str) -> None:
    server = guarded(library)
    trips, _, _ = shake_hands(engine(CLIENT, other, is_client=True), server, lambda _trip: [])
    assert trips <= 3
    assert server.door.statistics().retries == 0


@both
def test_strangers_garbage_before_the_peer_does_not_stand_in_its_way(library: str) -> None:
    print("seed 1")
    chance = random.Random(1)
    negotiation = encode_quic_version_negotiation(chance.randbytes(8), chance.randbytes(8), [1, 2])

    def flood(trip: int) -> Iterable[Datagram]:
        if trip > 1:
            return
        for address in (STRANGER, PEER):
            yield initial(chance, version=0x0A0A0A0A), address
            yield initial(chance, version=0), address
            yield initial(chance, length=1199), address
            yield initial(chance, cid=7), address
            yield initial(chance, cid=21), address
            for kind in (0xD3, 0xE3, 0xF3, 0x83, 0x43):
                yield initial(chance, first=kind), address
            yield negotiation + bytes(1200), address
            yield bytes(1200), address
            yield b"\xc3", address
        yield initial(chance), STRANGER
        yield real_initial(), STRANGER

    server = guarded(library)
    trips, _, _ = shake_hands(engine(CLIENT, library, is_client=True), server, flood)
    assert trips <= 3
    assert server.door.statistics().retries == 0
    print(server.door.statistics())


@all_four
@pytest.mark.parametrize("kind", ["undecryptable", "real", "broken"])
def test_the_peer_gets_in_through_a_flood_in_its_own_name(library: str, other: str, kind: str) -> None:
    print("seed 2")
    chance = random.Random(2)
    made = {"undecryptable": lambda: initial(chance), "real": real_initial, "broken": broken_hello}[kind]
    count = 400 if kind == "undecryptable" else 30
    supply = [made() for _ in range(count)]

    def flood(_trip: int) -> Iterable[Datagram]:
        return [(data, PEER) for data in supply]

    server = guarded(library)
    trips, flooded, answered = shake_hands(engine(CLIENT, other, is_client=True), server, flood)
    print(f"{kind}: {trips} round trips, {flooded} bytes came, {answered} went; {server.door.statistics()}")
    # One round trip more than without, for the token.
    assert trips <= 5
    # Half-open connections never have more than three times what came, nor does a Retry.
    assert answered <= 3 * (flooded + trips * 2 * 1200)


@both
def test_a_flood_leaves_one_half_open_connection_and_no_memory(library: str) -> None:
    print("seed 3")
    chance = random.Random(3)
    server = guarded(library)
    process = psutil.Process()
    for data in (real_initial(), broken_hello(), initial(chance)):
        server.receive(data, 0, PEER, 0.0)
    server.datagrams(0.0)
    before = process.memory_info().rss
    tracemalloc.start()
    sent = received = 0
    began = time.process_time()
    for number in range(4000):
        data = initial(chance)
        received += len(data)
        server.receive(data, 0, PEER, number / 10_000)
        if number % 100 == 99:
            sent += sum(len(data) for data, _ in server.datagrams(number / 10_000))
    spent = time.process_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown = process.memory_info().rss - before
    print(f"{received} bytes in, {sent} out, {peak} bytes at most, grown by {grown}, {spent * 250:.0f} µs a datagram")
    assert sent <= received
    assert peak < MIB
    assert grown < 16 * MIB
    assert server.door.statistics().begun <= 3


@both
def test_what_is_half_open_is_given_up_in_time(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_module, "INTRODUCTION_TIMEOUT", 0.3)
    print("seed 4")
    chance = random.Random(4)
    with closing(quic_pair(library)) as pair, udp() as attacker:
        address = pair.server._datagrams.sock.getsockname()
        began = time.monotonic()
        with pytest.raises(ConnectionOver, match="did not introduce itself"):
            while time.monotonic() < began + 5:
                attacker.sendto(chance.choice([initial(chance), real_initial()]), address)
                pair.server.turn(0.01)
        assert time.monotonic() - began < 2


@both
def test_a_connection_that_is_up_is_not_disturbed_by_a_flood(library: str) -> None:
    print("seed 5")
    chance = random.Random(5)
    with closing(quic_pair(library)) as pair, udp() as stranger:
        pair.up()
        near, far = pair.open()
        addresses = [carrier._datagrams.sock.getsockname() for carrier in (pair.client, pair.server)]
        real = real_initial()
        received = bytearray()
        with near, far:
            for number in range(300):
                for address in addresses:
                    for data in (initial(chance), real, encode_quic_version_negotiation(b"12345678", b"87654321", [9])):
                        stranger.sendto(data, address)
                near.send(number.to_bytes(2, "big"))
                for carrier in (pair.client, pair.server):
                    carrier.turn(0.0)

            def arrived() -> bool:
                try:
                    received.extend(far.recv(4096))
                except BlockingIOError:
                    return False
                return len(received) == 600

            pair.run(arrived)
        assert bytes(received) == b"".join(number.to_bytes(2, "big") for number in range(300))
        assert not pair.over


@both
def test_strangers_do_not_make_a_server_look_alive(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    soon_in_doubt(monkeypatch)
    with closing(quic_pair(library)) as pair, udp() as stranger:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt()
            pair.run(lambda: pair.client._doubted is None)
            pair.client.doubt()
            until = time.monotonic() + 3
            with pytest.raises(ConnectionOver, match="started again"):
                while time.monotonic() < until:
                    stranger.sendto(b"\x40" + bytes(40), pair.client._datagrams.sock.getsockname())
                    pair.client.turn(0.02)

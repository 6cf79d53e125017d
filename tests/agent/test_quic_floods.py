"""Floods at the UDP port of a QUIC server, with both libraries: the peer still gets in, and nothing piles up.

The attackers here know the port, and where they have to the peer's address too, which they put on their datagrams. What
they cannot do is read what is sent to that address.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import closing, suppress

import psutil
import pytest
from aioquic.buffer import Buffer
from aioquic.quic.packet import QuicFrameType, QuicPacketType, encode_quic_version_negotiation
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicPacketBuilderStop
from aioquic.tls import Context, Epoch
from hypothesis import given
from hypothesis import strategies as st

from agent.connect.quic import carrier as carrier_module
from agent.connect.quic.carrier import ConnectionOver
from agent.connect.quic.door import Answer, Begin, Door, Pass, initial_untrusted
from agent.connect.quic.engine import Engine, Up
from agent.connect.quic.labour import EACH, LAID_BY, Labour, TooMuchWork
from agent.connect.quic.process import Begin as Begun
from agent.connect.quic.process import decode_report, encode
from tests.agent.quic_pair import CLIENT, SERVER, SESSION, engine, quic_pair, soon_in_doubt, udp

LIBRARIES = ["qh3", "aioquic"]
both = pytest.mark.parametrize("library", LIBRARIES)
all_four = pytest.mark.parametrize(("library", "other"), [(a, b) for a in LIBRARIES for b in LIBRARIES])
PEER, STRANGER = ("192.0.2.1", 4000), ("192.0.2.66", 6666)
HOST = ("192.0.2.2", 5000)
MIB = 2**20
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


# --- a peer that has shown who it is, and floods -------------------------------------------------------------


def _write(kind: int, body: Callable[[random.Random], bytes]) -> Callable[[QuicPacketBuilder, random.Random], None]:
    def write(builder: QuicPacketBuilder, chance: random.Random) -> None:
        content = body(chance)
        builder.start_frame(kind, capacity=len(content) + 8).push_bytes(content)

    return write


def _number(value: int) -> bytes:
    return (0xC000000000000000 | value).to_bytes(8, "big")


HOSTILE = {
    "path challenges": _write(QuicFrameType.PATH_CHALLENGE, lambda chance: chance.randbytes(8)),
    "path responses": _write(QuicFrameType.PATH_RESPONSE, lambda chance: chance.randbytes(8)),
    "connection ids": _write(
        QuicFrameType.NEW_CONNECTION_ID,
        lambda chance: _number(chance.getrandbits(30)) + _number(0) + b"\x08" + chance.randbytes(24),
    ),
    "connection ids that retire the others": _write(
        QuicFrameType.NEW_CONNECTION_ID,
        lambda chance: 2 * _number(chance.getrandbits(30)) + b"\x08" + chance.randbytes(24),
    ),
    "handshake far ahead": _write(
        QuicFrameType.CRYPTO, lambda chance: _number(chance.getrandbits(18)) + b"\x20" + chance.randbytes(32)
    ),
    "stream data far ahead": _write(
        QuicFrameType.STREAM_BASE | 6,
        lambda chance: _number(0) + _number(4096 + chance.getrandbits(23)) + b"\x01" + chance.randbytes(1),
    ),
    "windows": _write(QuicFrameType.MAX_DATA, lambda chance: _number(chance.getrandbits(40))),
}
# What aioquic looks through all gaps for: fewer datagrams than of the others.
SLOWER = {("aioquic", "stream data far ahead"): 200, ("aioquic", "handshake far ahead"): 150}
# qh3 2.1 keeps an answer to each until it is acknowledged.
KEPT = ("qh3", "path challenges")
# Where each packet costs more than the one before, and answers are kept: what comes of it.
COSTLY = {
    KEPT: "acknowledges nothing",
    ("qh3", "connection ids that retire the others"): "compute far more",
    ("aioquic", "stream data far ahead"): "compute far more",
}


def hostile_datagram(
    client: Engine, write: Callable[[QuicPacketBuilder, random.Random], None], chance: random.Random
) -> tuple[bytes, int]:
    """A packet of a client that does as it likes, full of frames of one kind; and how many they are."""
    machine = client._connection
    builder = QuicPacketBuilder(
        host_cid=machine.host_cid,
        is_client=True,
        max_datagram_size=1400,
        packet_number=machine._packet_number,
        peer_cid=machine._peer_cid.cid,
        version=machine._version,
    )
    builder.start_packet(QuicPacketType.ONE_RTT, machine._cryptos[Epoch.ONE_RTT])
    count = 0
    with suppress(QuicPacketBuilderStop):
        while True:
            write(builder, chance)
            count += 1
    (data,), packets = builder.flush()
    machine._packet_number += len(packets)
    return data, count


@both
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_peer_costs_little_memory_or_its_connection(library: str, kind: str) -> None:
    print("seed 6")
    chance = random.Random(6)
    server, client = guarded(library), engine(CLIENT, "aioquic", is_client=True)
    # A tenth of what a peer may really cost.
    server.labour = Labour(LAID_BY / 10, EACH / 2)
    shake_hands(client, server, lambda _trip: [])
    process = psutil.Process()
    before, now, frames, ended = process.memory_info().rss, 10 * TRIP, 0, ""
    sent = received = 0
    began = time.thread_time()
    tracemalloc.start()
    for _ in range(SLOWER.get((library, kind), 400)):
        now += 0.001
        data, count = hostile_datagram(client, HOSTILE[kind], chance)
        frames += count
        received += len(data)
        try:
            server.receive(data, 0, PEER, now)
            timer = server.timer()
            if timer is not None and timer <= now:
                server.handle_timer(now)
            sent += sum(len(data) for data, _ in server.datagrams(now))
        except TooMuchWork as error:
            ended = error.sentence
            break
        ended = next((event.reason for event in server.events() if type(event).__name__ == "Closed"), "")
        if ended:
            break
    spent = time.thread_time() - began
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    grown = process.memory_info().rss - before
    print(f"{frames} {kind}: {received} bytes in, {sent} out, {peak} at most, grown by {grown}; {ended or 'goes on'}")
    print(f"{spent:.2f} s of processor time, of which {server.labour.least:.2f} s were left at least")
    if (library, kind) in COSTLY:
        assert COSTLY[library, kind] in ended
        # The peer is told.
        server.close(ended)
        assert server.datagrams(now)
    assert frames > 4000 or ended
    # To an address that was shown to be the peer's, a library may send what it thinks right.
    assert sent <= 5 * received
    assert grown < 32 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not count a process's memory for a limit")
def test_a_process_whose_peer_acknowledges_nothing_ends_in_words() -> None:
    print("seed 7")
    chance, limit = random.Random(7), 96 * MIB
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, udp() as there, udp() as here:
        address = there.getsockname()
        command = [sys.executable, "-m", "agent.connect.quic.process", str(theirs.fileno())]
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        begin = Begun(
            session_id=SESSION,
            node_key=SERVER.private_key_pem,
            peer_certificate=CLIENT.certificate_pem,
            known=(here.getsockname(),),
            library=KEPT[0],
            memory=limit,
        )
        socket.send_fds(ours, [encode(begin)], [there.fileno()])
        client = engine(CLIENT, "aioquic", is_client=True)
        client.connect(address, time.monotonic())
        here.settimeout(0.1)
        up = False
        while not up:
            for data, _ in client.datagrams(time.monotonic()):
                here.sendto(data, address)
            with suppress(TimeoutError):
                client.receive(here.recv(2048), 0, address, time.monotonic())
            if (timer := client.timer()) is not None and timer <= time.monotonic():
                client.handle_timer(time.monotonic())
            up = any(isinstance(event, Up) for event in client.events())
        for data, _ in client.datagrams(time.monotonic()):
            here.sendto(data, address)
        process, most, frames = psutil.Process(child.pid), 0, 0
        while child.poll() is None:
            assert frames < 5_000_000
            for _ in range(20):
                data, count = hostile_datagram(client, HOSTILE[KEPT[1]], chance)
                here.sendto(data, address)
                frames += count
            with suppress(psutil.Error):
                most = max(most, process.memory_info().rss)
            time.sleep(0.001)
        reports = []
        while packet := ours.recv(65536):
            reports.append(decode_report(packet))
    print(f"ended with {child.returncode} after {frames} frames, at most {most} bytes of memory: {reports}")
    assert most < limit + 64 * MIB
    assert child.returncode == 0
    assert "acknowledges nothing" in str(reports)


@both
@pytest.mark.parametrize(
    ("seed", "size", "loss"),
    [
        (0, 300_000, 0.1),
        pytest.param(1, 1_500_000, 0.2, marks=pytest.mark.soak),
        pytest.param(2, 1_500_000, 0.3, marks=pytest.mark.soak),
    ],
)
def test_no_honest_peer_costs_too_much_however_much_is_lost(library: str, seed: int, size: int, loss: float) -> None:
    print(f"seed {seed}")
    content = random.Random(seed).randbytes(size)
    with closing(quic_pair(library, loss=loss, seed=seed)) as pair:
        pair.up()
        near, far = pair.open()
        sent, received = 0, bytearray()

        def moved() -> bool:
            nonlocal sent
            with suppress(BlockingIOError):
                sent += near.send(content[sent : sent + 65536]) if sent < len(content) else 0
            with suppress(BlockingIOError):
                received.extend(far.recv(65536))
            return len(received) == len(content)

        with near, far:
            pair.run(moved, turns=60_000)
        assert bytes(received) == content
        assert not pair.over
        least = [carrier._engine.labour.least for carrier in (pair.client, pair.server)]
        print(f"of {LAID_BY} s laid by, {least} were left at least")
        assert min(least) > 0.9 * LAID_BY


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(0, 60)), max_size=50))
def test_labour_ends_a_connection_once_and_only_when_all_is_used_up(pieces: list[tuple[float, int]]) -> None:
    labour, ended = Labour(0.05, 0.001), 0
    left = 0.05
    for seconds, datagrams in pieces:
        left = min(0.05, left + 0.001 * datagrams) - seconds
        try:
            labour.did(seconds, datagrams)
        except TooMuchWork:
            ended += 1
            assert left < 0
        assert ended or left >= 0
    assert ended <= 1
    assert labour.least <= 0.05


def test_what_was_sent_into_a_window_that_then_shrank_is_no_flood() -> None:
    labour = Labour()
    labour.waits(16 * MIB, 16 * MIB)
    labour.waits(16 * MIB, 3000)
    with pytest.raises(TooMuchWork):
        labour.waits(18 * MIB, 3000)


# --- the door itself -----------------------------------------------------------------------------------------


@given(st.binary(max_size=1500), st.binary(max_size=40))
def test_any_datagram_is_judged(data: bytes, head: bytes) -> None:
    door = Door("aioquic")
    for each in (data, (head + bytes(1300))[:1300]):
        verdict = door.judge_untrusted(each, PEER, 0.0)
        assert verdict is None or isinstance(verdict, Begin | Pass | Answer)


@given(st.data())
def test_a_token_is_good_for_its_address_its_connection_and_its_time(data: st.DataObject) -> None:
    door, real = Door("aioquic"), real_initial()
    chance = random.Random(data.draw(st.integers(0, 1000)))
    assert isinstance(door.judge_untrusted(initial(chance), PEER, 0.0), Begin)
    answer = door.judge_untrusted(real, PEER, 0.0)
    assert isinstance(answer, Answer)
    packet = answer.data
    at = 6 + packet[5]
    retry_source, token = packet[at + 1 : at + 1 + packet[at]], packet[at + 1 + packet[at] : -16]

    def shown(token: bytes, destination: bytes, address: tuple[str, int], now: float) -> object:
        first = initial_untrusted(real)
        assert first is not None
        head = real[:5] + bytes([len(destination)]) + destination + bytes([len(first.source)]) + first.source
        forged = head + (0x4000 | len(token)).to_bytes(2, "big") + token + bytes(1200)
        return door.judge_untrusted(forged, address, now)

    changed = bytearray(token)
    changed[data.draw(st.integers(0, len(token) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert isinstance(shown(bytes(changed), retry_source, PEER, 1.0), Answer)
    assert isinstance(shown(token, chance.randbytes(8), PEER, 1.0), Answer)
    assert isinstance(shown(token, retry_source, STRANGER, 1.0), Answer)
    assert isinstance(shown(token, retry_source, PEER, 60.0), Answer)
    first = initial_untrusted(real)
    assert first is not None
    assert shown(token, retry_source, PEER, 1.0) == Begin(first.destination, retry_source)

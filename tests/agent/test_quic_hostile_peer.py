"""A QUIC peer that has shown who it is and then floods: it costs little memory and work, or its connection."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing, suppress

import psutil
import pytest
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicPacketBuilder, QuicPacketBuilderStop
from aioquic.tls import Epoch
from hypothesis import given
from hypothesis import strategies as st

from agent.connect.quic.engine import Engine, Up
from agent.connect.quic.labour import EACH, LAID_BY, Labour, TooMuchWork
from agent.connect.quic.process import Begin as Begun
from agent.connect.quic.process import decode_report, encode
from tests.agent.quic_flood import MIB, PEER, TRIP, guarded, shake_hands
from tests.agent.quic_pair import CLIENT, SERVER, SESSION, both, engine, quic_pair, udp


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

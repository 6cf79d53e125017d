"""The lab's own middleboxes do what their names say: a table per kind, and packets whose checksums stay right."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from nat import ACK, RST, SYN, TCP, UDP, Box, Endpoint, Packet, parse, reset_for, rewritten

OUTSIDE = bytes([203, 0, 113, 1])
HOST: Endpoint = (bytes([192, 168, 1, 10]), 5000)
PEER: Endpoint = (bytes([203, 0, 113, 9]), 6000)
OTHER_PORT: Endpoint = (PEER[0], 6001)
OTHER_HOST: Endpoint = (bytes([203, 0, 113, 8]), 6000)


def folded(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data)) if len(data) % 2 == 0 else folded(data + b"\0")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(source: Endpoint, destination: Endpoint, protocol: int = TCP, flags: int = SYN, body: bytes = b"") -> Packet:
    if protocol == TCP:
        segment = struct.pack(">HHIIBBHHH", source[1], destination[1], 7, 0, 0x50, flags, 1000, 0, 0) + body
        where = 16
    else:
        segment = struct.pack(">HHHH", source[1], destination[1], 8 + len(body), 0) + body
        where = 6
    pseudo = source[0] + destination[0] + struct.pack(">HH", protocol, len(segment))
    check = 0xFFFF - folded(pseudo + segment)
    segment = segment[:where] + check.to_bytes(2, "big") + segment[where + 2 :]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 0, 0x4000, 64, protocol, 0) + source[0] + destination[0]
    head = head[:10] + (0xFFFF - folded(head)).to_bytes(2, "big") + head[12:]
    found = parse(head + segment)
    assert found is not None
    return found


def is_sound(found: Packet) -> bool:
    segment = found.data[found.offset :]
    pseudo = found.source[0] + found.destination[0] + struct.pack(">HH", found.protocol, len(segment))
    return folded(found.data[: found.offset]) == 0xFFFF and folded(pseudo + segment) == 0xFFFF


@given(st.binary(max_size=50), st.binary(min_size=4, max_size=4), st.integers(1, 65535), st.sampled_from([TCP, UDP]))
def test_rewriting_keeps_checksums_right(body: bytes, address: bytes, port: int, protocol: int) -> None:
    before = packet(HOST, PEER, protocol, body=body)
    assert is_sound(before)
    after = rewritten(before, source=(address, port))
    assert is_sound(after)
    assert parse(after.data) == after
    assert is_sound(reset_for(packet(HOST, PEER)))


@pytest.mark.parametrize(
    ("filtering", "from_peer", "from_other_port", "from_other_host"),
    [("none", True, True, True), ("address", True, True, False), ("port", True, False, False)],
)
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_filtering(
    protocol: int, filtering: str, from_peer: bool, from_other_port: bool, from_other_host: bool
) -> None:
    for sender, expected in ((PEER, from_peer), (OTHER_PORT, from_other_port), (OTHER_HOST, from_other_host)):
        box = Box("n", OUTSIDE, filtering=filtering)
        out = box.outbound(packet(HOST, PEER, protocol))
        assert out is not None
        inside, back = box.inbound(packet(sender, out.source, protocol))
        assert (inside is not None) == expected
        assert back is None
        if inside is not None:
            assert inside.destination == HOST


def test_mapping() -> None:
    cone, symmetric = Box("c", OUTSIDE), Box("s", OUTSIDE, mapping="symmetric")
    seen = [[box.outbound(packet(HOST, to)) for to in (PEER, OTHER_PORT)] for box in (cone, symmetric)]
    ports = [[row.source for row in rows if row is not None] for rows in seen]
    assert ports[0][0] == ports[0][1]
    assert ports[1][0] != ports[1][1]
    assert ports[0][0] != (OUTSIDE, HOST[1])


def test_a_firewall_maps_nothing_and_lets_answers_in() -> None:
    box = Box("f", OUTSIDE, mapping="none")
    assert box.inbound(packet(PEER, HOST)) == (None, None)
    out = box.outbound(packet(HOST, PEER))
    assert out is not None
    assert out.source == HOST
    assert box.inbound(packet(PEER, HOST))[0] is not None


def test_unsolicited_connections_may_be_answered_with_rst() -> None:
    box = Box("r", OUTSIDE, resets=True)
    _, back = box.inbound(packet(PEER, (OUTSIDE, 4000)))
    assert back is not None
    assert back.flags == RST | ACK
    assert (back.source, back.destination) == ((OUTSIDE, 4000), PEER)


def test_crossing_syns_may_be_dropped_while_udp_passes() -> None:
    box = Box("x", OUTSIDE, crossing=False)
    out = box.outbound(packet(HOST, PEER))
    assert out is not None
    assert box.inbound(packet(PEER, out.source, flags=SYN | ACK))[0] is not None
    assert box.inbound(packet(PEER, out.source)) == (None, None)
    # It has lost its way with this flow, but not with others.
    assert box.inbound(packet(PEER, out.source, flags=SYN | ACK)) == (None, None)
    early = (PEER[0], PEER[1] + 2)
    assert box.inbound(packet(early, out.source)) == (None, None)
    assert box.outbound(packet(HOST, early)) is not None
    assert box.inbound(packet(early, out.source, flags=SYN | ACK)) == (None, None)
    other = (PEER[0], PEER[1] + 1)
    assert box.outbound(packet(HOST, other)) is not None
    assert box.inbound(packet(other, out.source, flags=SYN | ACK))[0] is not None
    datagram = box.outbound(packet(HOST, PEER, UDP))
    assert datagram is not None
    assert box.inbound(packet(PEER, datagram.source, UDP))[0] is not None


def test_udp_and_ports_may_be_blocked() -> None:
    box = Box("b", OUTSIDE, udp=False, tcp_ports=frozenset({443}))
    assert box.outbound(packet(HOST, PEER, UDP)) is None
    assert box.outbound(packet(HOST, PEER)) is None
    assert box.outbound(packet(HOST, (PEER[0], 443))) is not None

"""Packets of many segments: what losing single segments and translating addresses leave of them."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from large import Losses, surviving
from nat import ACK, TCP, Packet, fold, parse, rewritten

A, B, C = (bytes([10, 0, 0, last]) for last in (1, 2, 3))
SIZE = 1448


def pseudo(source: bytes, destination: bytes, length: int) -> int:
    """What the kernel leaves in the place of a checksum that somebody else finishes."""
    words = struct.unpack(">4H", source + destination)
    return fold(sum(words) + TCP + length)


def large(content: bytes, sequence: int) -> Packet:
    """A packet as a device with a virtio header gives it (IPv4, no options)."""
    length = 20 + len(content)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 65_530, 0x4000, 64, TCP, 0, A, B)
    ip = ip[:10] + struct.pack(">H", 0xFFFF - fold(sum(struct.unpack(">10H", ip)))) + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 5000, 6000, sequence, 7, 0x50, ACK | 8, 100, pseudo(A, B, length), 0)
    packet = parse(ip + tcp + content, struct.pack("=BBHHHH", 1, 1 if len(content) > SIZE else 0, 40, SIZE, 20, 16))
    assert packet is not None
    return packet


def check(packet: Packet) -> tuple[int, bytes]:
    """Sequence number and content of a packet that is as it must be."""
    assert fold(sum(struct.unpack(">10H", packet.data[:20]))) == 0xFFFF
    assert struct.unpack_from(">H", packet.data, 2) == (len(packet.data),)
    found = struct.unpack_from(">H", packet.data, 36)[0]
    assert found == pseudo(packet.source[0], packet.destination[0], len(packet.data) - 20)
    return struct.unpack_from(">I", packet.data, 24)[0], packet.data[40:]


@given(st.integers(1, 45 * SIZE), st.sampled_from([0.0, 0.01, 0.2, 0.7]), st.integers(0, 2**32 - 1), st.integers())
def test_lost_segments_are_missing_and_all_others_are_where_they_were(
    length: int, share: float, sequence: int, seed: int
) -> None:
    content = random.Random(length).randbytes(length)
    losses, same = Losses(share, random.Random(seed)), Losses(share, random.Random(seed))
    count = -(-length // SIZE)
    lost = same.lost_of(count)
    expected = {
        number: content[number * SIZE : (number + 1) * SIZE] for number in range(count) if number not in set(lost)
    }
    found = {}
    for piece in surviving(large(content, sequence), losses):
        first, data = check(piece)
        begin = (first - sequence) % 2**32
        assert begin % SIZE == 0
        assert (struct.unpack("=BBHHHH", piece.head)[3] == SIZE) or len(data) <= SIZE
        # Only the last segment may say that it is the last.
        assert bool(piece.data[33] & 8) == (begin + len(data) == length)
        for at in range(0, len(data), SIZE):
            found[(begin + at) // SIZE] = data[at : at + SIZE]
    assert found == expected


@given(st.floats(0.001, 0.5), st.integers(0, 100), st.lists(st.integers(1, 45), min_size=1, max_size=30))
def test_a_loss_does_not_depend_on_how_segments_are_packed(share: float, seed: int, counts: list[int]) -> None:
    packed, single = Losses(share, random.Random(seed)), Losses(share, random.Random(seed))
    at, lost = 0, []
    for count in counts:
        lost += [at + index for index in packed.lost_of(count)]
        at += count
    assert lost == [index for index in range(at) if single.lost_of(1)]


def test_as_many_are_lost_as_should_be() -> None:
    losses = Losses(0.01, random.Random(1))
    assert 800 < sum(len(losses.lost_of(10)) for _ in range(10_000)) < 1200
    assert not Losses(0.0, random.Random(1)).lost_of(1_000_000)


@given(st.integers(1, 3 * SIZE), st.integers(1, 65535))
def test_translated_addresses_keep_the_unfinished_checksum_right(length: int, port: int) -> None:
    packet = rewritten(large(bytes(length), 1), source=(C, port))
    assert check(packet) == (1, bytes(length))
    assert packet.source == (C, port)
    back = rewritten(packet, source=(A, 5000))
    assert back.data == large(bytes(length), 1).data

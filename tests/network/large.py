"""Packets as the kernel hands them over when it may leave segmentation to somebody else: many segments in one.

A TUN device with a virtio header (linux/virtio_net.h, linux/if_tun.h) gives and takes TCP data in packets of up to
64 KiB with unfinished checksums, which is what makes an emulator in Python carry hundreds of megabits a second. What is
lost is still single segments: a packet that loses some is cut around them.
"""

from __future__ import annotations

import fcntl
import math
import os
import random
import struct
from dataclasses import dataclass, replace

from nat import TCP, Packet, fold

_TUNSETOFFLOAD = 0x400454D0
_CHECKSUM, _TCP_4, _TCP_6 = 1, 2, 4
# flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_HEAD = struct.Struct("=BBHHHH")
HEAD = _HEAD.size
_FIN_PSH, _CWR = 0x09, 0x80


def offload(descriptor: int) -> None:
    """Have a device that was opened with a virtio header give large packets."""
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _CHECKSUM | _TCP_4 | _TCP_6)


@dataclass
class Losses:
    """Which segments are lost: each with the same probability, whatever packet it is in."""

    share: float
    rng: random.Random

    def __post_init__(self) -> None:
        self._left = self._draw()

    def _draw(self) -> int:
        """How many segments pass until the next one is lost."""
        return int(math.log(1.0 - self.rng.random()) / math.log(1.0 - self.share)) if self.share else 1 << 62

    def lost_of(self, count: int) -> list[int]:
        """Which of the next ``count`` segments are lost."""
        lost = []
        at = self._left
        while at < count:
            lost.append(at)
            at += 1 + self._draw()
        self._left = at - count
        return lost


def surviving(packet: Packet, losses: Losses) -> list[Packet]:
    """What is left of a packet."""
    size = _HEAD.unpack(packet.head)[3] if packet.head and packet.protocol == TCP else 0
    start = packet.offset + (packet.data[packet.offset + 12] >> 4) * 4 if size else 0
    count = max(1, -(-(len(packet.data) - start) // size)) if size else 1
    lost = losses.lost_of(count)
    if not lost:
        return [packet]
    kept, begin = [], 0
    for index in [*lost, count]:
        if index > begin:
            kept.append(_piece(packet, start, size, begin, index, count))
        begin = index + 1
    return kept


def _piece(packet: Packet, start: int, size: int, begin: int, end: int, count: int) -> Packet:
    """Some segments of a large packet as a packet of their own."""
    data = bytearray(packet.data[:start] + packet.data[start + begin * size : start + end * size])
    at = packet.offset
    old, new = len(packet.data) - at, len(data) - at
    if data[0] >> 4 == 4:
        (number,) = struct.unpack_from(">H", data, 4)
        struct.pack_into(">HH", data, 2, len(data), (number + begin) & 0xFFFF)
        data[10:12] = bytes(2)
        total = sum(struct.unpack(f">{at // 2}H", bytes(data[:at])))
        struct.pack_into(">H", data, 10, 0xFFFF - fold(total))
    else:
        struct.pack_into(">H", data, 4, new)
    (sequence,) = struct.unpack_from(">I", data, at + 4)
    struct.pack_into(">I", data, at + 4, (sequence + begin * size) & 0xFFFFFFFF)
    if end < count:
        data[at + 13] &= ~_FIN_PSH & 0xFF
    if begin:
        data[at + 13] &= ~_CWR & 0xFF
    (checksum,) = struct.unpack_from(">H", data, at + 16)
    struct.pack_into(">H", data, at + 16, fold(checksum + (0xFFFF - old) + new))
    flags, kind, length, _, first, where = _HEAD.unpack(packet.head)
    many = end - begin > 1
    head = _HEAD.pack(flags, kind if many else 0, length, size if many else 0, first, where)
    return replace(packet, data=bytes(data), head=head)


def read(descriptor: int) -> tuple[bytes, bytes]:
    """The next packet of a device and its virtio header. Raises OSError."""
    found = os.read(descriptor, HEAD + 65536)
    return found[HEAD:], found[:HEAD]

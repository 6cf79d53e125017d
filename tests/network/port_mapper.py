"""A home router's NAT-PMP service (RFC 6886) in front of a `nat.Box`. Sans I/O."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from nat import TCP, UDP, Box, Endpoint, Packet, parse

PORT = 5351


@dataclass
class PortMapper:
    """Answers packets to the gateway's port 5351. ``behaviour`` has switches: ``nat-pmp``, ``shift`` (grants other
    ports than asked for), ``lie`` (names a private outside address)."""

    box: Box
    gateway: bytes
    behaviour: dict[str, bool]
    started: float | None = None
    granted: dict[Endpoint, int] = field(default_factory=dict)

    def handle(self, packet: Packet, now: float) -> list[Packet] | None:
        """Answers to a packet for the gateway; None for packets that are not."""
        if packet.destination[0] != self.gateway:
            return None
        if packet.protocol != UDP or packet.destination[1] != PORT:
            return []
        self.started = self.started if self.started is not None else now
        body = packet.data[packet.offset + 8 :]
        answer = self._answer(body, packet.source[0], int(now - self.started))
        return [] if answer is None else [_datagram(packet, answer)]

    def _answer(self, body: bytes, inside: bytes, epoch: int) -> bytes | None:
        if len(body) < 2 or not self.behaviour.get("nat-pmp"):
            return None
        if body[0] != 0:
            return struct.pack(">BBHI", 0, 0x80 | body[1] & 0x7F, 1, epoch)
        if body[1] == 0:
            outside = bytes([10, 0, 0, 1]) if self.behaviour.get("lie") else self.box.outside
            return struct.pack(">BBHI", 0, 128, 0, epoch) + outside
        if body[1] not in (1, 2) or len(body) < 12:
            return None
        protocol = UDP if body[1] == 1 else TCP
        port, wanted, life = struct.unpack_from(">HHI", body, 4)
        if life == 0:
            self.box.forwards = {
                key: end for key, end in self.box.forwards.items() if end != (inside, port) or key[0] != protocol
            }
            return struct.pack(">BBHIHHI", 0, 128 + body[1], 0, epoch, port, 0, 0)
        outside_port = self.granted.get((inside, port), (wanted or port) + (1000 if self.behaviour.get("shift") else 0))
        self.granted[(inside, port)] = outside_port
        self.box.forwards[(protocol, outside_port)] = (inside, port)
        return struct.pack(">BBHIHHI", 0, 128 + body[1], 0, epoch, port, outside_port, life)


def _datagram(question: Packet, body: bytes) -> Packet:
    length = 8 + len(body)
    head = bytearray(
        struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, UDP, 0)
        + question.destination[0]
        + question.source[0]
    )
    total = sum(struct.unpack(">10H", bytes(head)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head[10:12] = (0xFFFF - total).to_bytes(2, "big")
    # A UDP checksum of zero means none over IPv4.
    udp = struct.pack(">HHHH", question.destination[1], question.source[1], length, 0)
    found = parse(bytes(head) + udp + body)
    assert found is not None
    return found

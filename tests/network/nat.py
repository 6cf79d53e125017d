"""Middleboxes as tables and rules, without I/O: what NATs and firewalls do to TCP and UDP packets (RFC 4787, 5382).

A `Box` maps (or not), filters, and may answer unsolicited connections with RST. Packets are bytes of IPv4 or IPv6.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from protocol.client_hello import parse_client_hello_untrusted
from protocol.errors import ProtocolError

TCP, UDP = 6, 17
FIN, SYN, RST, ACK = 1, 2, 4, 16
# Ports that NATs with port translation hand out.
FIRST_PORT, LAST_PORT = 20_000, 60_000

Endpoint = tuple[bytes, int]


@dataclass(frozen=True)
class Packet:
    """A TCP or UDP packet; ``offset`` is where its transport header begins, ``head`` what a device that leaves
    checksums and segmentation to others says of it (`large`)."""

    data: bytes
    protocol: int
    source: Endpoint
    destination: Endpoint
    offset: int
    flags: int = 0
    head: bytes = b""

    @property
    def is_syn(self) -> bool:
        return self.protocol == TCP and self.flags & (SYN | ACK | RST) == SYN


def parse(data: bytes, head: bytes = b"") -> Packet | None:
    """None for everything that is no whole TCP or UDP packet (fragments, ICMP, noise)."""
    if len(data) >= 28 and data[0] >> 4 == 4:
        offset, protocol = (data[0] & 15) * 4, data[9]
        if int.from_bytes(data[6:8], "big") & 0x3FFF:
            return None
        source, destination = data[12:16], data[16:20]
    elif len(data) >= 48 and data[0] >> 4 == 6:
        offset, protocol = 40, data[6]
        source, destination = data[8:24], data[24:40]
    else:
        return None
    if protocol not in (TCP, UDP) or len(data) < offset + (20 if protocol == TCP else 8):
        return None
    sport, dport = struct.unpack_from(">HH", data, offset)
    flags = data[offset + 13] if protocol == TCP else 0
    return Packet(data, protocol, (source, sport), (destination, dport), offset, flags, head)


def fold(total: int) -> int:
    """The ones' complement sum of 16 bits."""
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _sum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    return sum(struct.unpack(f">{len(data) // 2}H", data))


def rewritten(packet: Packet, *, source: Endpoint | None = None, destination: Endpoint | None = None) -> Packet:
    """The packet with other endpoints, checksums adjusted (RFC 1624)."""
    source, destination = source or packet.source, destination or packet.destination
    old, new = packet.source[0] + packet.destination[0], source[0] + destination[0]
    # A checksum that covers only the pseudo-header so far is its plain sum, without ports.
    partial = bool(packet.head) and bool(packet.head[0] & 1)
    if not partial:
        old += struct.pack(">HH", packet.source[1], packet.destination[1])
        new += struct.pack(">HH", source[1], destination[1])
    data, at = bytearray(packet.data), packet.offset
    struct.pack_into(">HH", data, at, source[1], destination[1])
    if data[0] >> 4 == 4:
        data[12:16], data[16:20] = source[0], destination[0]
        data[10:12] = bytes(2)
        data[10:12] = (0xFFFF - fold(_sum(bytes(data[:at])))).to_bytes(2, "big")
    else:
        data[8:24], data[24:40] = source[0], destination[0]
    where = at + (16 if packet.protocol == TCP else 6)
    (before,) = struct.unpack_from(">H", data, where)
    if partial:
        struct.pack_into(">H", data, where, fold(before + (0xFFFF * (len(old) // 2) - _sum(old)) + _sum(new)))
    elif before or packet.protocol == TCP:
        total = (0xFFFF - before) + (0xFFFF * (len(old) // 2) - _sum(old)) + _sum(new)
        struct.pack_into(">H", data, where, (0xFFFF - fold(total)) or (0xFFFF if packet.protocol == UDP else 0))
    return Packet(bytes(data), packet.protocol, source, destination, packet.offset, packet.flags, packet.head)


def reset_for(packet: Packet) -> Packet:
    """The RST that answers a SYN, from whom the SYN was meant for (IPv4)."""
    (sequence,) = struct.unpack_from(">I", packet.data, packet.offset + 4)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40, 0, 0x4000, 64, TCP, 0, packet.destination[0], packet.source[0])
    head = head[:10] + (0xFFFF - fold(_sum(head))).to_bytes(2, "big") + head[12:]
    body = struct.pack(
        ">HHIIBBHHH", packet.destination[1], packet.source[1], 0, sequence + 1 & 0xFFFFFFFF, 0x50, RST | ACK, 0, 0, 0
    )
    pseudo = packet.destination[0] + packet.source[0] + struct.pack(">HH", TCP, len(body))
    body = body[:16] + (0xFFFF - fold(_sum(pseudo + body))).to_bytes(2, "big") + body[18:]
    found = parse(head + body)
    assert found is not None
    return found


@dataclass
class _Greeting:
    """The first bytes of a connection, until they are known for what they are."""

    data: bytes = b""
    begins: int | None = None
    verdict: bool | None = None

    def passes(self, packet: Packet) -> bool:
        """Whether a packet on its way out may pass."""
        payload = packet.data[packet.offset + (packet.data[packet.offset + 12] >> 4) * 4 :]
        if self.verdict is None and payload:
            (sequence,) = struct.unpack_from(">I", packet.data, packet.offset + 4)
            if self.begins is None:
                self.begins = sequence
            if (sequence - self.begins) & 0xFFFFFFFF == len(self.data):
                self.data += payload
                self.verdict = is_https(self.data)
        return self.verdict is not False


def is_https(data: bytes) -> bool | None:
    """Whether a connection that begins so is HTTP over TLS; None when more must be seen."""
    try:
        hello = parse_client_hello_untrusted(data)
    except ProtocolError:
        return False
    return None if hello is None else bool(hello.alpn) and set(hello.alpn) <= {"h2", "http/1.1", "http/1.0"}


@dataclass
class Box:
    """One middlebox. ``mapping``: ``none``, ``endpoint``-independent or ``symmetric``; ``filtering``: ``none``,
    ``address`` or ``port``; ``outside`` is its public IPv4 address. IPv6 is never mapped, only filtered."""

    name: str
    outside: bytes
    mapping: str = "endpoint"
    filtering: str = "port"
    udp: bool = True
    tcp_ports: frozenset[int] | None = None
    resets: bool = False
    crossing: bool = True
    hairpin: bool = False
    # Outside ports are those of the inside where they are free, as Linux does it; else random ones.
    keeps_ports: bool = False
    # Lets out only connections whose first bytes are a TLS greeting that names nothing but HTTP.
    inspects: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    counters: dict[str, int] = field(default_factory=dict)
    _out: dict[tuple[object, ...], int] = field(default_factory=dict)
    _in: dict[tuple[int, int], tuple[Endpoint, tuple[object, ...]]] = field(default_factory=dict)
    _seen: dict[tuple[int, Endpoint], set[Endpoint]] = field(default_factory=dict)
    _answered: set[tuple[Endpoint, Endpoint]] = field(default_factory=set)
    _crossed: set[tuple[Endpoint, Endpoint]] = field(default_factory=set)
    _greetings: dict[tuple[Endpoint, Endpoint], _Greeting] = field(default_factory=dict)
    # Granted by port mapping: outside port → inside endpoint, for one protocol.
    forwards: dict[tuple[int, int], Endpoint] = field(default_factory=dict)

    def _count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0) + 1

    def outbound(self, packet: Packet) -> Packet | None:
        """A packet on its way out, as the outside sees it; None when it is not let out."""
        if (packet.protocol == UDP and not self.udp) or (
            packet.protocol == TCP and self.tcp_ports is not None and packet.destination[1] not in self.tcp_ports
        ):
            self._count("blocked")
            return None
        if self.inspects and packet.protocol == TCP and not self._is_https(packet):
            self._count("inspected")
            return None
        if packet.protocol == TCP and packet.flags & ACK:
            self._answered.add((packet.source, packet.destination))
        self._seen.setdefault((packet.protocol, packet.source), set()).add(packet.destination)
        if self.mapping == "none" or len(packet.source[0]) == 16:
            return packet
        forwarded = next((key for key, inside in self.forwards.items() if inside == packet.source), None)
        if forwarded is not None and forwarded[0] == packet.protocol:
            return rewritten(packet, source=(self.outside, forwarded[1]))
        key: tuple[object, ...] = (packet.protocol, packet.source)
        narrow = (*key, packet.destination)
        # A flow keeps its mapping when the box changes its ways.
        port = self._out.get(narrow)
        if self.mapping == "symmetric":
            key = narrow
        elif port is None or packet.is_syn:
            port = self._out.get(key)
        if port is None:
            port = self._free_port(packet.protocol, packet.source[1])
            self._out[key] = port
            self._in[(packet.protocol, port)] = (packet.source, key)
        return rewritten(packet, source=(self.outside, port))

    def _is_https(self, packet: Packet) -> bool:
        flow = (packet.source, packet.destination)
        if packet.is_syn:
            self._greetings[flow] = _Greeting()
        greeting = self._greetings.get(flow)
        return greeting is None or greeting.passes(packet)

    def _free_port(self, protocol: int, wanted: int) -> int:
        if self.keeps_ports and (protocol, wanted) not in self._in:
            return wanted
        while True:
            port = self.rng.randrange(FIRST_PORT, LAST_PORT)
            if (protocol, port) not in self._in and (protocol, port) not in self.forwards:
                return port

    def inbound(self, packet: Packet) -> tuple[Packet | None, Packet | None]:
        """A packet from outside: what goes on inside, and what goes back at once."""
        forwarded = self.forwards.get((packet.protocol, packet.destination[1]))
        if forwarded is not None and len(packet.destination[0]) == 4:
            return rewritten(packet, destination=forwarded), None
        inside: Endpoint | None
        if self.mapping == "none" or len(packet.destination[0]) == 16:
            inside = packet.destination
        else:
            found = self._in.get((packet.protocol, packet.destination[1]))
            inside = None if found is None else found[0]
            if found is not None and len(found[1]) == 3 and found[1][2] != packet.source:
                inside = None
        if inside is not None and not self.crossing and self._crosses(packet, inside):
            self._count("crossing")
            return None, None
        if inside is not None and self._lets_in(packet, inside):
            return rewritten(packet, destination=inside), None
        self._count("unsolicited")
        back = reset_for(packet) if self.resets and packet.is_syn and len(packet.source[0]) == 4 else None
        return None, back

    def _crosses(self, packet: Packet, inside: Endpoint) -> bool:
        """Whether a packet is of a flow in which a SYN came in before there was an answer. These boxes can make nothing
        of such a flow: the answer to the inside's own SYN does not get through any more either."""
        flow = (inside, packet.source)
        if packet.is_syn and not self._is_answered(packet, inside):
            self._crossed.add(flow)
        return packet.protocol == TCP and flow in self._crossed

    def _is_answered(self, packet: Packet, inside: Endpoint) -> bool:
        return (inside, packet.source) in self._answered

    def _lets_in(self, packet: Packet, inside: Endpoint) -> bool:
        if self.filtering == "none":
            return True
        seen = self._seen.get((packet.protocol, inside), set())
        if self.filtering == "address":
            return any(address == packet.source[0] for address, _ in seen)
        return packet.source in seen

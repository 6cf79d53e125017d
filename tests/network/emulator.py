"""A small internet in one process: hosts on TUN devices, middleboxes, and a delay on every way. Needs root.

``python emulator.py [--large] DEVICE…`` opens the devices (the caller moves them into network namespaces: an open one
stays connected), says ``ready``, and takes one JSON line after another on standard input: a whole new network each
time. With ``--large`` packets may have many segments, see `large`.

    {"boxes": [{"name": "n", "outside": "203.0.113.1", "parent": null, …fields of `nat.Box`…}],
     "hosts": [{"device": "tun0", "addresses": ["192.168.1.10"], "parent": "n", "delay": 0.015}],
     "loss": 0.0, "seed": 1, "number": 1}

``{"change": {"n": {"mapping": "endpoint"}}}`` changes boxes of the network there is, which keep their flows.
It answers each with ``ok`` and a line of the counters so far. The kernel has no netem; this needs nothing but TUN.
"""

from __future__ import annotations

import fcntl
import heapq
import ipaddress
import json
import os
import random
import select
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from large import HEAD, Losses, offload, read, surviving
from nat import Box, Packet, parse
from port_mapper import PortMapper

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 1, 0x1000, 0x4000
# The virtio header of a packet that is whole.
_PLAIN = bytes(HEAD)


def open_tun(name: str, *, many: bool) -> int:
    """A TUN device. Unless it gives ``many`` segments in one (`large`), every packet is one of at most its MTU."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if many else 0)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), flags))
    if many:
        offload(descriptor)
    return descriptor


class Network:
    """Nodes are names; hosts are leaves, boxes hold what is inside of them, None is the internet."""

    def __init__(self, description: dict[str, Any], devices: dict[str, int]) -> None:
        self.boxes: dict[str, Box] = {}
        self.mappers: dict[str, PortMapper] = {}
        self.parents: dict[str, str | None] = {}
        self.delays: dict[str, float] = {}
        self.hosts: dict[bytes, str] = {}
        self.devices = devices
        self.number = int(description.get("number", 0))
        self.loss = float(description.get("loss", 0.0))
        self.losses = Losses(self.loss, random.Random(description.get("seed", 1)))
        for row in description["boxes"]:
            self._add_box(dict(row))
        for row in description["hosts"]:
            name = row["device"]
            self.parents[name] = row["parent"]
            self.delays[name] = float(row.get("delay", 0.0))
            for address in row["addresses"]:
                self.hosts[ipaddress.ip_address(address).packed] = name

    def _add_box(self, row: dict[str, Any]) -> None:
        name, parent = row["name"], row.pop("parent")
        gateway, mapper = row.pop("gateway", None), row.pop("mapper", None)
        row["outside"] = ipaddress.ip_address(row["outside"]).packed
        if row.get("tcp_ports") is not None:
            row["tcp_ports"] = frozenset(row["tcp_ports"])
        # Other ports in each network: no flow of the one before looks like one of this.
        self.boxes[name] = Box(**row, rng=random.Random(f"{name} {self.number}"))
        self.parents[name] = parent
        if mapper is not None:
            self.mappers[name] = PortMapper(self.boxes[name], ipaddress.ip_address(gateway).packed, mapper)

    def change(self, changes: dict[str, dict[str, Any]]) -> None:
        """Have boxes behave otherwise from now on; what they know of flows stays."""
        for name, fields in changes.items():
            for key, value in fields.items():
                setattr(self.boxes[name], key, value)

    def _owner(self, address: bytes) -> str | None:
        """The host with an address, or the box that has it outside."""
        if address in self.hosts:
            return self.hosts[address]
        return next((name for name, box in self.boxes.items() if box.outside == address), None)

    def _child_of(self, parent: str | None, address: bytes) -> str | None:
        """The child of a node through which an address is reached, if it may be reached from there at all."""
        node = self._owner(address)
        while node is not None:
            above = self.parents[node]
            if above == parent:
                return node
            # What is behind a translating box cannot be addressed from outside of it.
            if above is None or (self.boxes[above].mapping != "none" and len(address) == 4):
                return None
            node = above
        return None

    def send(self, device: str, packet: Packet) -> list[tuple[float, str | None, Packet, str | None]]:
        """A host's packet on its way up: (delay, device to write to or None, packet, where it goes down from)."""
        node, here = self.parents[device], packet
        while node is not None:
            if (mapper := self.mappers.get(node)) is not None:
                answers = mapper.handle(here, time.monotonic())
                if answers is not None:
                    return [(0.0, device, answer, None) for answer in answers]
            if self._child_of(node, here.destination[0]) is not None and self.boxes[node].mapping != "none":
                return self.descend(node, here, self.delays[device])
            box = self.boxes[node]
            out = box.outbound(here)
            if out is None:
                return []
            if out.destination[0] == box.outside:
                return self._enter(node, out, self.delays[device]) if box.hairpin else []
            node, here = self.parents[node], out
        left = surviving(here, self.losses)
        return [row for each in left for row in self.descend(None, each, self.delays[device], far=True)]

    def descend(
        self, node: str | None, packet: Packet, delay: float, *, far: bool = False
    ) -> list[tuple[float, str | None, Packet, str | None]]:
        """Into a child of ``node``: later, since the far end's boxes must see the packet when it gets there."""
        child = self._child_of(node, packet.destination[0])
        if child is None:
            return []
        extra = self._delay_below(child) if far else 0.0
        return [(delay + extra, None, packet, child)]

    def _delay_below(self, node: str) -> float:
        if node in self.delays:
            return self.delays[node]
        return max((self._delay_below(name) for name, parent in self.parents.items() if parent == node), default=0.0)

    def _enter(self, node: str, packet: Packet, delay: float) -> list[tuple[float, str | None, Packet, str | None]]:
        return [(delay, None, packet, node)]

    def arrive(self, node: str, packet: Packet) -> list[tuple[float, str | None, Packet, str | None]]:
        """A packet has reached a node from above."""
        if node not in self.boxes:
            return [(0.0, node, packet, None)]
        inside, back = self.boxes[node].inbound(packet)
        if back is not None:
            return self.descend(self.parents[node], back, self._delay_below(node), far=True)
        if inside is None:
            return []
        child = self._child_of(node, inside.destination[0])
        return [] if child is None else self.arrive(child, inside)

    def counters(self) -> dict[str, dict[str, int]]:
        """What the boxes have dropped."""
        return {name: box.counters for name, box in self.boxes.items()}


def main(names: list[str], *, many: bool) -> None:
    devices = {name: open_tun(name, many=many) for name in names}
    by_descriptor = {descriptor: name for name, descriptor in devices.items()}
    network: Network | None = None
    queue: list[tuple[float, int, str | None, Packet, str | None]] = []
    serial = 0
    poll = select.poll()
    for descriptor in (*devices.values(), 0):
        poll.register(descriptor, select.POLLIN)
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        wait = max(0.0, queue[0][0] - now) if queue else None
        # Whole milliseconds only: the last one is spun through.
        for descriptor, _ in poll.poll(None if wait is None else int(wait * 1000)):
            if descriptor == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                counters = {} if network is None else network.counters()
                description = json.loads(line)
                if network is not None and "change" in description:
                    network.change(description["change"])
                else:
                    network = Network(description, devices)
                    queue.clear()
                print("ok " + json.dumps(counters), flush=True)
                continue
            for _ in range(64):
                try:
                    data, head = read(descriptor) if many else (os.read(descriptor, 65536), b"")
                except (BlockingIOError, OSError):
                    break
                packet = parse(data, head)
                if packet is None or network is None:
                    continue
                now = time.monotonic()
                for row in network.send(by_descriptor[descriptor], packet):
                    serial += 1
                    heapq.heappush(queue, (now + row[0], serial, *row[1:]))
        now = time.monotonic()
        while queue and queue[0][0] <= now:
            _, _, device, packet, node = heapq.heappop(queue)
            if device is not None:
                try:
                    os.write(devices[device], (packet.head or _PLAIN) + packet.data if many else packet.data)
                except OSError:
                    continue
            elif node is not None and network is not None:
                for row in network.arrive(node, packet):
                    serial += 1
                    heapq.heappush(queue, (now + row[0], serial, *row[1:]))


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "--large"], many="--large" in sys.argv)

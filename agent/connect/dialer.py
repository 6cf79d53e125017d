"""Dialling a peer's candidates, and which of them may be dialled at all.

Candidates come from a peer through the relay: an agent must not become a tool to scan or reach places its owner did not
mean. Loopback is dialled only when the owner allows it or the peer is this very node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable

import psutil
import trio

from protocol.control import Candidate
from protocol.errors import RetryLater

MAX_CANDIDATES = 16
DIAL_TIMEOUT = 5.0


def allowed_untrusted(candidates: Iterable[Candidate], *, loopback: bool) -> list[tuple[str, int]]:
    """Addresses that may be dialled, in the peer's order, at most `MAX_CANDIDATES`. Names are never looked up."""
    addresses: list[tuple[str, int]] = []
    for candidate in candidates:
        if candidate.kind != "host" or not 0 < candidate.port < 65536 or len(addresses) >= MAX_CANDIDATES:
            continue
        try:
            address = ipaddress.ip_address(candidate.host)
        except ValueError:
            continue
        if address.is_multicast or address.is_unspecified or address.is_link_local:
            continue
        # IPv6's own loopback lies in a reserved block, so it is looked at first.
        if not loopback if address.is_loopback else address.is_reserved:
            continue
        addresses.append((str(address), candidate.port))
    return addresses


def own_candidates(port: int, advertise: Iterable[str], *, loopback: bool) -> list[Candidate]:
    """Where this node may be reached: what the owner advertises, else the addresses of its interfaces."""
    hosts = list(advertise)
    if not hosts:
        for addresses in psutil.net_if_addrs().values():
            for row in addresses:
                if row.family in (socket.AF_INET, socket.AF_INET6):
                    hosts.append(row.address.partition("%")[0])
    candidates = [Candidate(kind="host", host=host, port=port) for host in hosts]
    if loopback:
        candidates.append(Candidate(kind="host", host="127.0.0.1", port=port))
    usable = {address for address, _ in allowed_untrusted(candidates, loopback=loopback)}
    kept: dict[str, Candidate] = {}
    for candidate in candidates:
        if candidate.host in usable:
            kept.setdefault(candidate.host, candidate)
    return list(kept.values())


async def dial(addresses: list[tuple[str, int]]) -> socket.socket:
    """A connected socket to the first address that answers. Raises `RetryLater` when none does."""
    for host, port in addresses:
        with trio.move_on_after(DIAL_TIMEOUT):
            try:
                stream = await trio.open_tcp_stream(host, port)
            except OSError:
                continue
            descriptor = os.dup(stream.socket.fileno())
            await stream.aclose()
            return socket.socket(fileno=descriptor)
    raise RetryLater(
        "None of the addresses of the source could be reached; check that its data port is open to this machine.",
        code="CONNECT_FAILED",
        who="source owner",
    )

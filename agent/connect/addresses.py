"""This machine's own addresses, and the rules that follow from them for what a peer offers."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from protocol.candidates import HOST, Candidate, Network, Rules

# Addresses of its own that a node tells a peer.
MAX_OWN = 16


@dataclass(frozen=True)
class Interfaces:
    """Addresses of the interfaces that are up, and their networks; loopback and link-local ones left out."""

    addresses: tuple[str, ...]
    networks: tuple[Network, ...]


def look() -> Interfaces:
    """The interfaces as they are now."""
    up = {name for name, row in psutil.net_if_stats().items() if row.isup}
    addresses: list[str] = []
    networks: list[Network] = []
    for name, rows in psutil.net_if_addrs().items():
        if name not in up:
            continue
        for row in rows:
            if row.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            text = row.address.partition("%")[0]
            address = ipaddress.ip_address(text)
            if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
                continue
            addresses.append(str(address))
            if row.netmask:
                try:
                    networks.append(ipaddress.ip_network(f"{text}/{_prefix(row.netmask)}", strict=False))
                except ValueError:
                    continue
    # IPv6 first, then in the system's order.
    addresses.sort(key=lambda text: ":" not in text)
    return Interfaces(tuple(dict.fromkeys(addresses)), tuple(dict.fromkeys(networks)))


def _prefix(netmask: str) -> str:
    if ":" not in netmask:
        return netmask
    return str(int(ipaddress.IPv6Address(netmask.partition("/")[0])).bit_count())


def own_candidates(
    port: int,
    interfaces: Interfaces,
    advertise: Iterable[str] = (),
    *,
    families: Iterable[int] = (socket.AF_INET, socket.AF_INET6),
    loopback: bool = False,
    slot: int = 0,
) -> list[Candidate]:
    """Where a port of this node may be reached: what the owner advertises, else the addresses of its interfaces.

    Only addresses of families that the port listens on; host names in ``advertise`` are left to the caller.
    """
    families = frozenset(families)
    hosts = [host for host in advertise if _is_address(host)] or list(interfaces.addresses)
    wanted = [host for host in hosts if (socket.AF_INET6 if ":" in host else socket.AF_INET) in families]
    if loopback:
        wanted.append("127.0.0.1")
    return [Candidate(kind=HOST, host=host, port=port, slot=slot) for host in dict.fromkeys(wanted)][:MAX_OWN]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def rules_for(interfaces: Interfaces, *, loopback: bool, observed: str, peer_observed: str) -> Rules:
    """What may be dialled for one peer. ``observed`` and ``peer_observed`` are the relay's word on where both are."""
    return Rules(
        own=frozenset(interfaces.addresses),
        networks=interfaces.networks,
        loopback=loopback,
        same_site=bool(observed) and observed == peer_observed,
        observed=peer_observed,
    )

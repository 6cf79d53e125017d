"""Messages that ask a router for a port mapping: PCP (RFC 6887) and its predecessor NAT-PMP (RFC 6886). Sans I/O.

A router is whatever answers at the default gateway's address: every answer is read as hostile input.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from protocol.errors import ProtocolError

PORT = 5351
MAX_MESSAGE = 1100
TCP = 6
# Seconds a mapping is asked for; what a router grants is held between the other two.
LIFE, SHORTEST, LONGEST = 3600, 120, 86400

_PCP, _NAT_PMP = 2, 0
_MAP = 1
_ANSWER = 0x80
_UNSUPPORTED = 1


class OtherVersion(ProtocolError):
    """The router speaks another version: NAT-PMP, most likely."""

    default_code = "PCP_VERSION"


class Refused(ProtocolError):
    """The router says no."""

    default_code = "PORT_MAPPING_REFUSED"


@dataclass(frozen=True, slots=True)
class Granted:
    """A mapping: the outside address (empty where the answer does not tell) and port, and for how long (seconds).

    The port may be another than the one asked for. ``epoch`` going back means that the router has forgotten everything.
    """

    address: str
    port: int
    life: float
    epoch: int


def pcp_request(client: str, nonce: bytes, inside: int, outside: int, life: int) -> bytes:
    """Ask for a TCP mapping; ``life`` 0 gives it back. ``nonce`` (12 bytes) is the same in renewals."""
    head = struct.pack(">BBHI", _PCP, _MAP, 0, life) + _packed(client)
    return head + nonce + struct.pack(">BBHHH", TCP, 0, 0, inside, outside) + _packed("0.0.0.0")  # noqa: S104 - "any", in a message


def _packed(address: str) -> bytes:
    return ipaddress.IPv6Address(f"::ffff:{address}").packed


def parse_pcp_untrusted(data: bytes, nonce: bytes, inside: int) -> Granted:
    """A router's answer. Raises only `ProtocolError` (`OtherVersion`, `Refused`)."""
    if len(data) > MAX_MESSAGE or len(data) < 4:
        raise ProtocolError("The router's answer is malformed.")
    if data[0] != _PCP or data[3] == _UNSUPPORTED:
        raise OtherVersion("The router does not speak PCP.")
    if len(data) < 60 or data[1] != _ANSWER | _MAP:
        raise ProtocolError("The router's answer is malformed.")
    if data[3]:
        raise Refused(f"The router refuses a port mapping (PCP result {data[3]}).")
    life, epoch = struct.unpack_from(">II", data, 4)
    protocol, _, _, port, outside = struct.unpack_from(">BBHHH", data, 36)
    if data[24:36] != nonce or protocol != TCP or port != inside or not outside:
        raise ProtocolError("The router answers for another mapping.")
    address = ipaddress.IPv6Address(data[44:60])
    return Granted(str(address.ipv4_mapped or address), outside, _held(life), epoch)


def address_request() -> bytes:
    """NAT-PMP: ask for the outside address."""
    return bytes([_NAT_PMP, 0])


def parse_address_untrusted(data: bytes) -> str:
    """The outside address. Raises only `ProtocolError`."""
    if len(data) != 12 or data[:2] != bytes([_NAT_PMP, _ANSWER]):
        raise ProtocolError("The router's answer is malformed.")
    _check_result(data)
    return str(ipaddress.IPv4Address(data[8:12]))


def map_request(inside: int, outside: int, life: int) -> bytes:
    """NAT-PMP: ask for a TCP mapping; ``life`` 0 gives it back."""
    return struct.pack(">BBHHHI", _NAT_PMP, 2, 0, inside, outside, life)


def parse_map_untrusted(data: bytes, inside: int) -> Granted:
    """A granted mapping; its address is not told. Raises only `ProtocolError`."""
    if len(data) != 16 or data[:2] != bytes([_NAT_PMP, _ANSWER | 2]):
        raise ProtocolError("The router's answer is malformed.")
    _check_result(data)
    epoch, port, outside, life = struct.unpack_from(">IHHI", data, 4)
    if port != inside or not outside:
        raise ProtocolError("The router answers for another mapping.")
    return Granted("", outside, _held(life), epoch)


def _check_result(data: bytes) -> None:
    result = int.from_bytes(data[2:4], "big")
    if result:
        raise Refused(f"The router refuses a port mapping (NAT-PMP result {result}).")


def _held(life: int) -> float:
    if life == 0:
        raise Refused("The router grants a port mapping for no time at all.")
    return float(min(max(life, SHORTEST), LONGEST))


def outside_problem(address: str, observed: str) -> str:
    """Why an outside address that a router names helps nobody, or an empty text.

    ``observed`` is where the relay sees this machine, empty when not known: another address means a second NAT.
    """
    found = ipaddress.ip_address(address)
    if found.is_loopback or found.is_multicast or found.is_unspecified or found.is_link_local:
        return f"The router names {address} as its outside address, which cannot be one."
    inside = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
    if found.version == 4 and any(found in ipaddress.ip_network(text) for text in inside):
        return f"The router's own outside address {address} is a private one: there is a second NAT behind it."
    if observed and ":" not in observed and observed != address:
        return f"The router names {address} as its outside address, the relay sees {observed}: there is a second NAT."
    return ""

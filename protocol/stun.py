"""STUN binding requests and answers (RFC 8489), as far as finding one's own mapped address needs them. Sans I/O.

The attributes of RFC 5780 used here: CHANGE-REQUEST with "change port" (does the NAT let answers from another port in?)
and OTHER-ADDRESS (which other port there is). FINGERPRINT is checked where present and always sent. One attribute is
our own, and optional to understand: `PortNote`, by which the relay knows whose port it sees.
"""

from __future__ import annotations

import ipaddress
import os
import struct
import zlib
from dataclasses import dataclass

from protocol.errors import ProtocolError

MAGIC = 0x2112A442
HEADER = 20
# Nothing that is asked or answered here comes near this.
MAX_MESSAGE = 1024

_REQUEST, _SUCCESS, _ERROR = 0x0001, 0x0101, 0x0111
_MAPPED, _CHANGE, _XOR_MAPPED, _FINGERPRINT, _OTHER = 0x0001, 0x0003, 0x0020, 0x8028, 0x802C
_UNKNOWN_ATTRIBUTES, _ERROR_CODE = 0x000A, 0x0009
_CHANGE_PORT = 0x02
_FINGERPRINT_XOR = 0x5354554E
# Of our own, from the range that need not be understood.
_NOTE = 0xC0F7
NOTE_TOKEN = 16
# Attributes below 0x8000 must be understood by whoever gets a request (RFC 8489 section 14).
_UNDERSTOOD = frozenset({_CHANGE})

Endpoint = tuple[str, int]


@dataclass(frozen=True, slots=True)
class PortNote:
    """Whose port asks: the token (16 bytes) that the relay gave for it, its slot, and the same slot's port over IPv6 (0
    for none)."""

    token: bytes
    slot: int
    port_v6: int = 0


@dataclass(frozen=True, slots=True)
class BindingRequest:
    """Somebody asks which address he is seen at, perhaps with an answer from another port."""

    transaction: bytes
    change_port: bool = False
    unknown: tuple[int, ...] = ()
    note: PortNote | None = None


@dataclass(frozen=True, slots=True)
class BindingAnswer:
    """The address a request came from, and another port of the same server where it named one."""

    transaction: bytes
    mapped: Endpoint
    other: Endpoint | None = None


def new_transaction() -> bytes:
    """Twelve random bytes."""
    return os.urandom(12)


def looks_like_stun(data: bytes) -> bool | None:
    """Whether a stream that begins so carries STUN (never TLS, whose first byte is 22); None while that is open."""
    head = b"\x00\x01"
    if data[:2] != head[: len(data[:2])]:
        return False
    if len(data) < 8:
        return None if len(data) < 4 or MAGIC.to_bytes(4, "big").startswith(data[4:8]) else False
    return int.from_bytes(data[4:8], "big") == MAGIC


def stream_length_untrusted(data: bytes) -> int | None:
    """Length of the message at the start of a stream (RFC 8489 section 6.2.2); None while the header is incomplete.

    Raises `ProtocolError` for what cannot be STUN or is too long.
    """
    if len(data) < HEADER:
        return None
    _, length, magic = struct.unpack_from(">HHI", data)
    if magic != MAGIC or length % 4 or HEADER + length > MAX_MESSAGE:
        raise ProtocolError("A STUN message is malformed.")
    return int(HEADER + length)


def encode_request(transaction: bytes, *, change_port: bool = False, note: PortNote | None = None) -> bytes:
    """A binding request."""
    attributes = struct.pack(">HHI", _CHANGE, 4, _CHANGE_PORT) if change_port else b""
    if note is not None:
        attributes += struct.pack(">HH16sBxH", _NOTE, NOTE_TOKEN + 4, note.token, note.slot, note.port_v6)
    return _message(_REQUEST, transaction, attributes)


def encode_answer(transaction: bytes, mapped: Endpoint, other: Endpoint | None = None) -> bytes:
    """A success response."""
    attributes = _address_attribute(_XOR_MAPPED, mapped, transaction)
    if other is not None:
        attributes += _address_attribute(_OTHER, other, None)
    return _message(_SUCCESS, transaction, attributes)


def encode_unknown(transaction: bytes, unknown: tuple[int, ...]) -> bytes:
    """Error 420: attributes that must be understood are not."""
    listed = b"".join(number.to_bytes(2, "big") for number in unknown[:8])
    attributes = struct.pack(">HHHBB", _ERROR_CODE, 4, 0, 4, 20)
    attributes += struct.pack(">HH", _UNKNOWN_ATTRIBUTES, len(listed)) + listed + bytes(-len(listed) % 4)
    return _message(_ERROR, transaction, attributes)


def _message(kind: int, transaction: bytes, attributes: bytes) -> bytes:
    # The fingerprint covers a header that counts the fingerprint itself (RFC 8489 section 14.7).
    head = struct.pack(">HHI", kind, len(attributes) + 8, MAGIC) + transaction + attributes
    return head + struct.pack(">HHI", _FINGERPRINT, 4, zlib.crc32(head) ^ _FINGERPRINT_XOR)


def _address_attribute(kind: int, endpoint: Endpoint, transaction: bytes | None) -> bytes:
    address = ipaddress.ip_address(endpoint[0])
    packed, port = address.packed, endpoint[1]
    if transaction is not None:
        packed, port = _masked(packed, transaction), port ^ (MAGIC >> 16)
    return struct.pack(">HHBBH", kind, 4 + len(packed), 0, 1 if address.version == 4 else 2, port) + packed


def _masked(packed: bytes, transaction: bytes) -> bytes:
    mask = MAGIC.to_bytes(4, "big") + transaction
    return bytes(left ^ right for left, right in zip(packed, mask, strict=False))


def parse_request_untrusted(data: bytes) -> BindingRequest:
    """A binding request. Raises only `ProtocolError`."""
    kind, transaction, attributes = _parse(data)
    if kind != _REQUEST:
        raise ProtocolError("A STUN message is no binding request.")
    change, note = False, None
    for number, value in attributes:
        if number == _CHANGE:
            if len(value) != 4:
                raise ProtocolError("A STUN message is malformed.")
            change = bool(value[3] & _CHANGE_PORT)
        elif number == _NOTE:
            if len(value) != NOTE_TOKEN + 4:
                raise ProtocolError("A STUN message is malformed.")
            note = PortNote(*struct.unpack(">16sBxH", value))
    unknown = tuple(number for number, _ in attributes if number < 0x8000 and number not in _UNDERSTOOD)
    return BindingRequest(transaction, change, unknown, note)


def parse_answer_untrusted(data: bytes) -> BindingAnswer:
    """A success response with a mapped address. Raises only `ProtocolError`."""
    kind, transaction, attributes = _parse(data)
    if kind != _SUCCESS:
        raise ProtocolError("A STUN message is no answer to a binding request.")
    found: dict[int, Endpoint] = {}
    for number, value in attributes:
        if number in (_MAPPED, _XOR_MAPPED, _OTHER):
            found.setdefault(number, _endpoint(value, transaction if number == _XOR_MAPPED else None))
    mapped = found.get(_XOR_MAPPED) or found.get(_MAPPED)
    if mapped is None:
        raise ProtocolError("A STUN answer names no address.")
    return BindingAnswer(transaction, mapped, found.get(_OTHER))


def _parse(data: bytes) -> tuple[int, bytes, list[tuple[int, bytes]]]:
    if len(data) > MAX_MESSAGE or stream_length_untrusted(data) != len(data):
        raise ProtocolError("A STUN message is malformed.")
    kind = int.from_bytes(data[:2], "big")
    attributes: list[tuple[int, bytes]] = []
    position = HEADER
    while position < len(data):
        if position + 4 > len(data):
            raise ProtocolError("A STUN message is malformed.")
        number, length = struct.unpack_from(">HH", data, position)
        value = data[position + 4 : position + 4 + length]
        if len(value) != length:
            raise ProtocolError("A STUN message is malformed.")
        if number == _FINGERPRINT:
            expected = struct.pack(">I", zlib.crc32(data[:position]) ^ _FINGERPRINT_XOR)
            if value != expected or position + 8 != len(data):
                raise ProtocolError("A STUN message was altered on its way.")
        attributes.append((number, value))
        position += 4 + length + (-length % 4)
    if position != len(data):
        raise ProtocolError("A STUN message is malformed.")
    return kind, data[8:HEADER], attributes


def _endpoint(value: bytes, transaction: bytes | None) -> Endpoint:
    if len(value) not in (8, 20) or value[1] != (1 if len(value) == 8 else 2):
        raise ProtocolError("A STUN message is malformed.")
    port, packed = int.from_bytes(value[2:4], "big"), value[4:]
    if transaction is not None:
        port, packed = port ^ (MAGIC >> 16), _masked(packed, transaction)
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address), port

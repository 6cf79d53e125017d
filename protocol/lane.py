"""Bulk lanes: one-way streams of checked content from a source to a destination.

A frame is two four-byte big-endian lengths (header, payload), a msgpack header and raw payload bytes. Every
piece of content carries its BLAKE3 digest; the destination checks it before the piece counts. A lane belongs to
the control stream whose ``instance`` it names in its first frame.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from blake3 import blake3

from protocol.errors import ProtocolError
from protocol.session import MAX_BLOCK

FRAME = struct.Struct(">II")
MAX_HEADER = 1024 * 1024


class Header(msgspec.Struct, tag_field="t", array_like=True, frozen=True):
    """Base of all frame headers."""


class LaneHello(Header, tag="h", frozen=True):
    """Destination to source, once: which control stream this lane joins, and its number there."""

    instance: bytes
    lane: int


class LaneReady(Header, tag="y", frozen=True):
    """Source to destination, once: the lane is accepted."""


class Block(Header, tag="b", frozen=True):
    """Part of a file at ``offset``; the payload is the content, or with ``whole`` a zstd frame of so many bytes of it.
    ``last`` ends request ``r``."""

    r: int
    offset: int
    digest: bytes
    last: bool = False
    whole: int = 0


class Packed(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One file of a pack: its index in the request, its size and digest, or why it could not be read."""

    index: int
    size: int
    digest: bytes
    error: dict[str, Any] | None = None


class Pack(Header, tag="p", frozen=True):
    """Several whole files; the payload is their contents one after the other, or with ``whole`` a zstd frame of so many
    bytes of them."""

    r: int
    files: list[Packed]
    last: bool = False
    whole: int = 0


class ReadFailed(Header, tag="f", frozen=True):
    """Request ``r`` ends here; ``error`` is an error document."""

    r: int
    error: dict[str, Any]


AnyHeader = LaneHello | LaneReady | Block | Pack | ReadFailed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyHeader] = msgspec.msgpack.Decoder(AnyHeader)


def encode_header(header: AnyHeader, payload_length: int = 0) -> bytes:
    """Frame lengths and header; the payload follows separately, never copied."""
    body = _encoder.encode(header)
    return FRAME.pack(len(body), payload_length) + body


def size_of(packed: Packed) -> int:
    """Bytes that one file takes in the header of a pack."""
    return len(_encoder.encode(packed))


def lengths_untrusted(prefix: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Header and payload length of a frame. Raises only `ProtocolError`."""
    header, payload = FRAME.unpack(prefix)
    if not 0 < header <= MAX_HEADER or payload > MAX_BLOCK:
        raise ProtocolError(f"A lane frame of {header} + {payload} bytes is outside what is allowed.")
    return header, payload


def header_untrusted(body: bytes | bytearray | memoryview) -> AnyHeader:
    """A frame header from a peer. Raises only `ProtocolError`."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A lane frame of the peer cannot be read: {error}") from error


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 of some content, 32 bytes."""
    return blake3(data).digest()

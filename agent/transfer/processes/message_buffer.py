"""Messages of private socket pairs that also carry descriptors: msgpack behind a four-byte length, and the two that
are said on each of them. Sans I/O.

Both ends are our own processes of one version, so nothing here is hostile, but lengths are bounded all the same.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec

# What one read asks for, in bytes; descriptors come beside them.
CHUNK = 256 * 1024
MOST_DESCRIPTORS = 16

_encoder = msgspec.msgpack.Encoder()


class Message(msgspec.Struct, tag_field="t", frozen=True, kw_only=True):
    """Base of all messages. ``descriptors`` says how many descriptors come with it."""

    descriptors: int = 0


class AreYouThere(Message, tag="there", frozen=True, kw_only=True):
    """Nothing was heard for a while: say so if you can."""


class Here(Message, tag="here", frozen=True, kw_only=True):
    """Answer to `AreYouThere`."""


class Garbled(Exception):
    """The other end says what no end of the pair says."""


def room() -> int:
    """How much ``recvmsg`` is to keep free for descriptors. Windows knows none of this, and imports the module."""
    return socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)


def framed(message: Message) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


def rights(descriptors: Iterable[int]) -> list[tuple[int, int, bytes]]:
    """Descriptors as ``sendmsg`` takes them."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes())]


def attached(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors in what ``recvmsg`` gave beside the data, the caller's from now on. The system leaves one out
    where the receiver may open no more."""
    numbers = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return numbers.tolist()


class MessageBuffer:
    """What ``recvmsg`` gave, in; messages of the type ``receives``, of at most ``longest`` bytes, with their
    descriptors, out."""

    def __init__(self, receives: Any, longest: int) -> None:
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._longest = longest
        self._buffer = bytearray()
        self._descriptors: deque[int] = deque()

    def feed(self, data: bytes, ancillary: Iterable[tuple[int, int, bytes]], flags: int = 0) -> None:
        """Take in what has come. Raises `Garbled` when descriptors are missing from it, since those of later messages
        would be taken for them."""
        self._buffer += data
        self._descriptors.extend(attached(ancillary))
        if flags & socket.MSG_CTRUNC:
            raise Garbled

    def next(self) -> tuple[Any, list[int]] | None:
        """The next message and its descriptors, the caller's from now on; None until it is whole. Raises `Garbled`."""
        if len(self._buffer) < 4:
            return None
        end = 4 + int.from_bytes(self._buffer[:4], "big")
        if end - 4 > self._longest:
            raise Garbled
        if len(self._buffer) < end:
            return None
        try:
            message = self._decoder.decode(self._buffer[4:end])
        except (msgspec.DecodeError, RecursionError) as error:
            raise Garbled from error
        del self._buffer[:end]
        if message.descriptors > len(self._descriptors):
            raise Garbled
        return message, [self._descriptors.popleft() for _ in range(message.descriptors)]

    def close(self) -> None:
        """Close every descriptor that belongs to no message yet. Safe to call twice."""
        while self._descriptors:
            os.close(self._descriptors.popleft())

"""What the daemon and its fork server say to each other. Each message is one packet of the pair (SOCK_SEQPACKET).

Both ends are our own processes of one version.
"""

from __future__ import annotations

import msgspec

# Bytes of the longest message, and more.
MOST = 4096


class _Message(msgspec.Struct, tag_field="t", frozen=True, kw_only=True):
    """Base of all messages. Workers are counted by the daemon, since a process id may come again."""


class Fork(_Message, tag="fork", frozen=True, kw_only=True):
    """Fork a worker; its end of its channel is attached."""

    worker: int


class Made(_Message, tag="made", frozen=True, kw_only=True):
    """It was forked; a descriptor of its process is attached."""

    worker: int
    pid: int


class Refused(_Message, tag="refused", frozen=True, kw_only=True):
    """The system gave no process; ``errno`` says why."""

    worker: int
    errno: int


class Ended(_Message, tag="ended", frozen=True, kw_only=True):
    """A worker has ended, with this code, or by this signal (negative)."""

    worker: int
    code: int


class Ready(_Message, tag="ready", frozen=True, kw_only=True):
    """Everything is loaded."""


FromServer = Made | Refused | Ended | Ready

_encoder = msgspec.msgpack.Encoder()
_to_server = msgspec.msgpack.Decoder(Fork)
_from_server: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)


def packet(message: Fork | FromServer) -> bytes:
    """A message as it travels."""
    return _encoder.encode(message)


def request(data: bytes) -> Fork:
    """What the daemon says. Raises `msgspec.DecodeError`."""
    return _to_server.decode(data)


def answer(data: bytes) -> FromServer:
    """What the fork server says. Raises `msgspec.DecodeError`."""
    return _from_server.decode(data)

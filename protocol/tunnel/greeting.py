"""What is said on a tunnel connection before it is joined: one line from the agent, one line from the relay.

Both are JSON with a newline behind. After the relay's line that says "joined" it closes its side of the outer TLS; the
agent reads up to that close and only then closes its own, so nothing of the inner connection is ever read by mistake
into the outer one on the agent's side; what the relay reads too far it passes on.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from protocol.control import Record
from protocol.errors import ProtocolError, TowpathError, error_from_document_untrusted

MAX_LINE = 8192

R = TypeVar("R", bound=Record)


class Presented(Record, frozen=True, kw_only=True):
    """The agent's line."""

    token: str


class Verdict(Record, frozen=True, kw_only=True):
    """The relay's line: joined, or the reason why not."""

    joined: bool
    error: dict[str, Any] | None = None


def encode_line(message: Record) -> bytes:
    """A message with its newline."""
    return msgspec.json.encode(message) + b"\n"


class LineReader:
    """Collects one line. Feed it what arrives; `rest` is what came behind the line."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed_untrusted(self, data: bytes | bytearray) -> bytes | None:
        """The line once it is complete. Raises `ProtocolError` when it grows too long."""
        self._data += data
        end = self._data.find(b"\n")
        if end > MAX_LINE or (end < 0 and len(self._data) > MAX_LINE):
            raise ProtocolError("The greeting on a tunnel connection is too long.")
        return None if end < 0 else bytes(self._data[:end])

    @property
    def rest(self) -> bytes:
        """Bytes behind the line."""
        return bytes(self._data[self._data.find(b"\n") + 1 :])


def presented_untrusted(line: bytes) -> Presented:
    """The agent's line. Raises only `ProtocolError`."""
    return _decode(line, Presented)


def verdict_untrusted(line: bytes) -> None:
    """Return when the relay's line says "joined". Raises the relay's reason as `TowpathError`, or `ProtocolError`."""
    verdict = _decode(line, Verdict)
    if verdict.joined:
        return
    error: TowpathError = error_from_document_untrusted(verdict.error or {})
    raise error


def _decode(line: bytes, kind: type[R]) -> R:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("The greeting on a tunnel connection cannot be read.") from error

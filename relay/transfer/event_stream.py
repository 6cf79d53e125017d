"""An agent's event stream: from chunks of bytes to checked lines."""

from __future__ import annotations

from protocol.control import AgentEvent, decode_untrusted
from protocol.errors import ProtocolError

MAX_LINE = 1024 * 1024
# Far more events than any agent has, and small enough for every database.
MAX_NUMBER = 2**53


class LineReader:
    """Splits chunks into lines. ``feed_untrusted`` raises only `ProtocolError`."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed_untrusted(self, chunk: bytes) -> list[AgentEvent]:
        """The lines that are complete with this chunk. Empty lines keep a connection alive and mean nothing.

        Raises `ProtocolError` for a line that is too long or no event; the reader is of no use then."""
        first, *others = chunk.split(b"\n")
        # What is there already is not copied for each piece of a line: a peer may send it in a million.
        self._rest += first
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"An event of the agent is longer than {MAX_LINE} bytes.")
        if not others:
            return []
        lines = [bytes(self._rest), *others[:-1]]
        self._rest = bytearray(others[-1])
        return [_line_untrusted(line) for line in lines if line.strip()]


def _line_untrusted(line: bytes) -> AgentEvent:
    if len(line) > MAX_LINE:
        raise ProtocolError(f"An event of the agent is longer than {MAX_LINE} bytes.")
    event = decode_untrusted(line, AgentEvent)
    if not (0 <= event.n <= MAX_NUMBER and 0 <= event.seq <= MAX_NUMBER and -1 <= event.generation <= MAX_NUMBER):
        raise ProtocolError("An event of the agent has a number that cannot be.")
    if event.observed is not None and not 0 <= event.observed.revision <= MAX_NUMBER:
        raise ProtocolError("An event of the agent has a revision that cannot be.")
    return event

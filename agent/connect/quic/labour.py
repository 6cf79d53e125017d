"""What a QUIC peer may cost in processor time, and in answers that it never acknowledges. Sans I/O.

Both libraries have places where one packet costs more the more was sent before it: pieces with gaps between them
(aioquic), connection ids that retire others (qh3). A peer that has shown who it is can keep its connection's process
busy with them for ever. Honest datagrams cost some 5 to 50 µs, also when every third is lost; so each that comes or
goes pays for far more than that, and a peer that uses up what is laid by as well is let go.
"""

from __future__ import annotations

from protocol.errors import ProtocolError

# Seconds of processor time that are laid by, and what each datagram adds to them; measured on machines a tenth as fast
# as those of the figures above it is still four times what honest ones take.
LAID_BY, EACH = 3.0, 0.002
# Bytes beyond the widest window so far that may be on their way unacknowledged. Answers to PATH_CHALLENGE are sent
# whatever the window says, and qh3 keeps some 280 bytes for each of 36 until it is acknowledged.
UNACKNOWLEDGED = 1024 * 1024


class TooMuchWork(ProtocolError):
    """No honest peer makes QUIC work so much, or keep so much, for what it sends."""

    default_code = "QUIC_TOO_COSTLY"


class Labour:
    """One connection's. Tell it each piece of work; it raises once, so that a goodbye can still be sent."""

    def __init__(self, laid_by: float = LAID_BY, each: float = EACH) -> None:
        self._most, self._each = laid_by, each
        self._left = laid_by
        self._widest = 0
        self._over = False
        # The least that was left so far.
        self.least = laid_by

    def did(self, seconds: float, datagrams: int) -> None:
        """The library took so much processor time, over so many datagrams. Raises `TooMuchWork`."""
        self._left = min(self._most, self._left + datagrams * self._each) - seconds
        self.least = min(self.least, self._left)
        if self._left < 0:
            self._end("The peer makes QUIC compute far more than what it sends can need.")

    def waits(self, on_the_way: int, window: int) -> None:
        """So many bytes are unacknowledged, and so many may be, by the congestion control. Raises `TooMuchWork`."""
        self._widest = max(self._widest, window)
        if on_the_way > self._widest + UNACKNOWLEDGED:
            self._end("The peer makes QUIC answer ever more, and acknowledges nothing.")

    def _end(self, sentence: str) -> None:
        if not self._over:
            self._over = True
            raise TooMuchWork(sentence)

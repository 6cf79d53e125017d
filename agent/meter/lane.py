"""What is measured of one lane, at either end."""

from __future__ import annotations

from agent.meter.time_shares import TimeShares
from protocol.congestion import Connection, TcpFacts, tcp_facts


class LaneMeter:
    """Belongs to one lane; its thread counts, others read."""

    __slots__ = ("content", "records", "saved", "sock", "times")

    def __init__(self, sock: Connection) -> None:
        self.sock = sock
        self.times = TimeShares()
        # Content bytes that have passed.
        self.content = 0
        # Of these, bytes that compression kept off the network.
        self.saved = 0
        # TLS records that have passed, at most.
        self.records = 0

    def facts(self) -> TcpFacts | None:
        """What the system knows of its connection; None where it is none of TCP, or gone."""
        return tcp_facts(self.sock)

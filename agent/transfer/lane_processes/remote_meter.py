"""What is measured of a lane that lives in a lane process."""

from __future__ import annotations

import socket

from agent.transfer.lane_processes import lane_messages as say
from protocol.congestion import TcpFacts, tcp_facts


class RemoteMeter:
    """Stands for the `LaneMeter` of a lane in another process, as far as that has told."""

    def __init__(self, sock: socket.socket) -> None:
        self.content = 0
        self.saved = 0
        self.records = 0
        self.times = self
        self._totals = [0.0] * 5
        self._socket = sock

    def totals(self) -> list[float]:
        """As `TimeShares.totals`."""
        return list(self._totals)

    def facts(self) -> TcpFacts | None:
        """As `LaneMeter.facts`: the connection is known here, too."""
        return tcp_facts(self._socket)

    def note(self, reading: say.Reading) -> int:
        """What the other process has measured; how many bytes have crossed the network since the last time."""
        before = self.content - self.saved
        self.content, self.saved, self._totals = reading.content, reading.saved, reading.times
        self.records = reading.records
        return max(0, self.content - self.saved - before)

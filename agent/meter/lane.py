"""What is measured of one lane, at either end."""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from agent.meter.time_shares import TimeShares
from protocol.congestion import LONG_PATH, Connection, TcpFacts, tcp_facts
from protocol.session import LaneReading, LaneReadings


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

    def held_back(self) -> float:
        """Seconds since its beginning in which only the receiver kept it from sending. 0 where the system does not
        tell, and on long paths, where a full window is mostly the path's: more than it holds is under way."""
        facts = self.facts()
        short = facts is not None and facts.least is not None and facts.least < LONG_PATH
        return facts.window if facts is not None and short else 0.0


def readings_of(r: int, meters: Mapping[int, LaneMeter], *, silent: bool = False) -> LaneReadings:
    """What is measured of the lanes now."""
    lanes = []
    for number, meter in sorted(meters.items()):
        facts = meter.facts()
        reading = LaneReading(number, meter.content, meter.times.totals())
        if facts is not None:
            reading = msgspec.structs.replace(
                reading,
                rtt=facts.rtt,
                retransmissions=facts.retransmissions,
                busy=facts.busy,
                window=facts.window,
            )
        lanes.append(reading)
    return LaneReadings(r, time.monotonic(), time.process_time(), lanes, silent)

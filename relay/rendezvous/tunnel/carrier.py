"""The relay's own process for WebSocket, which also moves what passes between two connections of it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from protocol.websocket.carrier import Carrier
from protocol.websocket.orders import Report
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.mover import PairEnded
from relay.rendezvous.tunnel.process import Begin, Usage, encode

_reports = msgspec.msgpack.Decoder(Report | Usage | PairEnded)


class TunnelCarrier(Carrier):
    """``on_report`` gets what it says of its pairs, ``on_end`` is called when the process has died with all of them."""

    def __init__(
        self, limits: TunnelLimits, on_report: Callable[[Usage | PairEnded], None], on_end: Callable[[], None]
    ) -> None:
        super().__init__("relay.rendezvous.tunnel.websocket_process")
        self._limits = limits
        self._on_report = on_report
        self._on_end = on_end

    def beginning(self) -> list[bytes]:
        return [encode(Begin(self._limits)), *super().beginning()]

    def take_report(self, packet: bytes) -> None:
        report = _reports.decode(packet)
        if isinstance(report, Report):
            self.take_count(report)
        else:
            self._on_report(report)

    def ended(self) -> None:
        super().ended()
        self._on_end()

"""The process that moves tunnelled bytes, so that they never hold up the relay's other work. Composition only.

Started by the relay as ``python -m relay.rendezvous.tunnel.process FD`` with one end of a SOCK_SEQPACKET pair. Each
packet is one msgpack message; `Join` carries two connected sockets. It ends when the relay's end is closed.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import sys
import time

import msgspec

from relay.process import raise_file_limit
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.mover import Mover, PairEnded

MAX_PACKET = 160 * 1024
REPORT_EVERY = 1.0


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """First message to the process."""

    limits: TunnelLimits


class Join(msgspec.Struct, frozen=True, tag="join"):
    """Join the two sockets that come with this packet; ``heads`` were read off them already."""

    pair_id: str
    session_id: str
    user: str
    heads: tuple[bytes, bytes]
    user_left: int = 0
    session_left: int = 0


class JoinLines(msgspec.Struct, frozen=True, tag="join_lines"):
    """Join two connections of which those with a number (see `protocol.websocket.orders.Carry`) are carried by this
    very process: the sockets that come with this are the local ones through which they were seen so far."""

    join: Join
    numbers: tuple[int, int]


class Cut(msgspec.Struct, frozen=True, tag="cut"):
    """End all pairs of a session."""

    session_id: str


class Usage(msgspec.Struct, frozen=True, tag="usage"):
    """Bytes moved for each user since the last report, pairs and CPU seconds now."""

    users: dict[str, int]
    pairs: int
    cpu: float


ToProcess = Begin | Join | JoinLines | Cut
ToRelay = PairEnded | Usage

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(ToProcess)
_reports = msgspec.msgpack.Decoder(ToRelay)


def encode(message: ToProcess | ToRelay) -> bytes:
    """A message as one packet."""
    return _encoder.encode(message)


def decode_report(packet: bytes) -> ToRelay:
    """What the process says."""
    report: ToRelay = _reports.decode(packet)
    return report


class _Process:
    def __init__(self, line: socket.socket) -> None:
        self._line = line
        begin = _orders.decode(line.recv(MAX_PACKET))
        assert isinstance(begin, Begin)
        line.setblocking(False)
        self._mover = Mover(begin.limits, self._tell)
        self._mover.watch(line.fileno())
        self._gone = False

    def run(self) -> None:
        next_report = time.monotonic()
        while not self._gone:
            if self._mover.turn(REPORT_EVERY):
                self._take_orders()
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + REPORT_EVERY
                usage = self._mover.usage()
                spent = resource.getrusage(resource.RUSAGE_SELF)
                pairs = self._mover.statistics().pairs
                self._tell(Usage(usage, pairs, spent.ru_utime + spent.ru_stime))
        self._mover.close()

    def _take_orders(self) -> None:
        for _ in range(16):
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._line, MAX_PACKET, 2)
            except BlockingIOError:
                return
            if not packet:
                self._gone = True
                return
            order = _orders.decode(packet)
            if isinstance(order, Join):
                sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
                if len(sockets) == 2:
                    self._mover.add(
                        order.pair_id,
                        order.session_id,
                        order.user,
                        (sockets[0], sockets[1]),
                        order.heads,
                        user_left=order.user_left,
                        session_left=order.session_left,
                    )
            elif isinstance(order, Cut):
                self._mover.cut_session(order.session_id)

    def _tell(self, report: ToRelay) -> None:
        # A relay that does not read is told its totals later or never; the moving goes on.
        with contextlib.suppress(BlockingIOError):
            try:
                self._line.send(encode(report))
            except BrokenPipeError:
                self._gone = True


def main() -> None:
    """Entry point of the process."""
    # Ctrl-C and the service manager's SIGTERM reach the whole group; the relay decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Each pair takes two descriptors, and two more for each direction that is held up.
    raise_file_limit()
    _Process(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()

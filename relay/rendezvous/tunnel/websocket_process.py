"""The process that speaks WebSocket for the relay, and moves what passes between two connections itself. Composition
only.

Where at least one leg of a pair is inside WebSocket and nothing else of its user is moved elsewhere, the bytes go from
one leg to the other here, without a way through the moving process and its local sockets. Limits and turns are those
of the moving process (`mover`); all that one user moves is in one of the two.
"""

from __future__ import annotations

import gc
import resource
import selectors
import signal
import socket
import sys
import time

import msgspec

from protocol.websocket.orders import Carry, Serve
from protocol.websocket.process import Process
from relay.process import raise_file_limit
from relay.rendezvous.tunnel.ends import End, LineEnd, RawEnd
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.mover import Mover, PairEnded
from relay.rendezvous.tunnel.process import MAX_PACKET, Begin, Cut, Join, JoinLines, Usage, encode

_orders = msgspec.msgpack.Decoder(Begin | Join | JoinLines | Cut | Serve | Carry)


class TunnelProcess(Process):
    """Carries connections as every process of its kind, until they are joined."""

    longest = MAX_PACKET

    def __init__(self, line: socket.socket) -> None:
        super().__init__(line)
        self._mover = self._new_mover(TunnelLimits())

    def _new_mover(self, limits: TunnelLimits) -> Mover:
        mover = Mover(limits, self._pair_ended, on_closed=self._give_back)
        self.selector.register(mover, selectors.EVENT_READ, mover)
        return mover

    def wait(self, now: float) -> float:
        return self._mover.wait(now)

    def turn(self) -> None:
        self._mover.turn(0.0)

    def carried(self) -> int:
        return super().carried() + self._mover.statistics().lines

    def take_order(self, packet: bytes, sockets: list[socket.socket]) -> None:
        order = _orders.decode(packet)
        if isinstance(order, Begin):
            self.selector.unregister(self._mover)
            self._mover.close()
            self._mover = self._new_mover(order.limits)
        elif isinstance(order, Cut):
            self._mover.cut_session(order.session_id)
        elif isinstance(order, Join | JoinLines):
            if len(sockets) == 2:
                self._join(order, (sockets[0], sockets[1]))
        else:
            super().take_order(packet, sockets)

    def _join(self, order: Join | JoinLines, sockets: tuple[socket.socket, socket.socket]) -> None:
        join, numbers = (order, (0, 0)) if isinstance(order, Join) else (order.join, order.numbers)
        names = join.pair_id, join.session_id, join.user
        if not any(numbers):
            self._mover.add(*names, sockets, join.heads, user_left=join.user_left, session_left=join.session_left)
            return
        first, second = (
            self._end(number, sock, head) for number, sock, head in zip(numbers, sockets, join.heads, strict=True)
        )
        self._mover.add_joined(*names, (first, second), user_left=join.user_left, session_left=join.session_left)

    def _end(self, number: int, sock: socket.socket, head: bytes) -> End:
        shuttle = self.lend(number) if number else None
        # One that has ended meanwhile left what it had in its local socket.
        return RawEnd(sock, head, self.buffer) if shuttle is None else LineEnd(shuttle, sock, time.monotonic())

    def _give_back(self, end: End) -> None:
        if isinstance(end, LineEnd):
            self.take_back(end.shuttle)
        else:
            end.close()

    def _pair_ended(self, report: PairEnded) -> None:
        self.tell(encode(report))

    def _report(self) -> None:
        super()._report()
        spent = resource.getrusage(resource.RUSAGE_SELF)
        usage = self._mover.usage()
        pairs = self._mover.statistics().pairs
        if usage or pairs:
            self.tell(encode(Usage(usage, pairs, spent.ru_utime + spent.ru_stime)))


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise_file_limit()
    gc.freeze()
    TunnelProcess(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()

"""The process that carries WebSocket connections, so that TLS and framing hold up neither relay nor daemon.

Composition only. Started as ``python -m protocol.websocket.process FD`` with one end of a SOCK_SEQPACKET pair; each
packet is one message. `Carry` comes with two connected sockets. It ends when its starter closes its end.
"""

from __future__ import annotations

import gc
import selectors
import signal
import socket
import ssl
import sys
import time
from collections import deque
from typing import TYPE_CHECKING

from protocol.websocket.core import FEED, Core
from protocol.websocket.line import Line, Over
from protocol.websocket.orders import ALPN, MAX_PACKET, Carry, Report, Serve, decode_order, encode
from protocol.websocket.secured import READ
from protocol.websocket.shuttle import Shuttle
from protocol.websocket.tls import LibraryTls, Tls

if TYPE_CHECKING:
    from protocol.websocket.server_tls import ServerContext

# The least TLS: what a reverse proxy or an inspecting firewall may still speak. The inside is encrypted by itself.
LEAST_TLS = ssl.TLSVersion.TLSv1_2
_LOOK_EVERY = 1.0


class Process:
    """The loop. Others build on it by overriding `take_order`, `wait` and `turn`."""

    # The longest packet of the starter's.
    longest = MAX_PACKET

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        line.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(line, selectors.EVENT_READ, None)
        self._server: ServerContext | None = None
        self._clients: dict[tuple[str | None, bool], ssl.SSLContext] = {}
        self._shuttles: dict[Shuttle, list[int]] = {}
        self._numbers: dict[int, Shuttle] = {}
        self._number_of: dict[Shuttle, int] = {}
        self._busy: deque[Shuttle] = deque()
        self._gone = False
        self.buffer = memoryview(bytearray(FEED))
        self._raw = memoryview(bytearray(READ))

    def run(self) -> None:
        """Until the starter closes its end."""
        next_look = time.monotonic() + _LOOK_EVERY
        while not self._gone:
            now = time.monotonic()
            wait = 0.0 if self._busy else max(0.0, min(next_look - now, self.wait(now)))
            turns = dict.fromkeys(self._busy)
            self._busy.clear()
            for key, mask in self.selector.select(wait):
                if key.data is None:
                    self._take_orders()
                elif isinstance(key.data, Shuttle):
                    key.data.ready(key.fileobj, mask)
                    turns[key.data] = None
            for shuttle in turns:
                self._step(shuttle)
            self.turn()
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_EVERY
                for shuttle in list(self._shuttles):
                    self._step(shuttle)
                self._report()
        for shuttle in list(self._shuttles):
            shuttle.close()

    def wait(self, now: float) -> float:
        """How long there is nothing else to do, if nothing happens (seconds)."""
        return _LOOK_EVERY

    def turn(self) -> None:
        """Something else, after each look at the sockets."""

    def _step(self, shuttle: Shuttle) -> None:
        if shuttle not in self._shuttles:
            return
        try:
            shuttle.step(time.monotonic())
        except Over:
            self._forget(shuttle)
            shuttle.close()
            return
        if shuttle.again:
            self._busy.append(shuttle)
        self._wait_for(shuttle)

    def _forget(self, shuttle: Shuttle) -> None:
        for sock, mask in zip(shuttle.sockets, self._shuttles.pop(shuttle), strict=True):
            if mask:
                self.selector.unregister(sock)
        self._numbers.pop(self._number_of.pop(shuttle, 0), None)

    def lend(self, number: int) -> Shuttle | None:
        """The open connection with this number, which this loop leaves alone from now on; None when it is over."""
        shuttle = self._numbers.get(number)
        if shuttle is None or not shuttle.line.opened:
            return None
        self._forget(shuttle)
        return shuttle

    def take_back(self, shuttle: Shuttle) -> None:
        """Both its streams are complete: say goodbye for it."""
        shuttle.take_back()
        self._shuttles[shuttle] = [0, 0]
        self._step(shuttle)

    def _wait_for(self, shuttle: Shuttle) -> None:
        masks = self._shuttles[shuttle]
        for number, (sock, wish) in enumerate(zip(shuttle.sockets, shuttle.wishes(), strict=True)):
            if wish == masks[number]:
                continue
            if not masks[number]:
                self.selector.register(sock, wish, shuttle)
            elif not wish:
                self.selector.unregister(sock)
            else:
                self.selector.modify(sock, wish, shuttle)
            masks[number] = wish

    # --- orders ----------------------------------------------------------------------------------------------

    def _take_orders(self) -> None:
        for _ in range(16):
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._line, self.longest, 2)
            except BlockingIOError:
                return
            except OSError:
                packet, descriptors = b"", []
            if not packet:
                self._gone = True
                return
            self.take_order(packet, [socket.socket(fileno=descriptor) for descriptor in descriptors])

    def take_order(self, packet: bytes, sockets: list[socket.socket]) -> None:
        """One packet of the starter, with what came along."""
        order = decode_order(packet)
        if isinstance(order, Serve):
            self._serve(order)
        elif len(sockets) == 2:
            self._carry(order, *sockets)

    def _serve(self, order: Serve) -> None:
        # Here, not above: agents' processes are clients alone, and the library takes memory.
        from protocol.websocket.server_tls import ServerContext

        self._server = ServerContext(order.certificate, order.key)

    def _client(self, ca_pem: str | None, hint: bool) -> ssl.SSLContext:
        context = self._clients.get((ca_pem, hint))
        if context is None:
            context = ssl.create_default_context(cadata=ca_pem) if ca_pem else ssl.create_default_context()
            context.minimum_version = LEAST_TLS
            context.set_alpn_protocols(list(ALPN if hint else ALPN[:1]))
            self._clients[ca_pem, hint] = context
        return context

    def _carry(self, order: Carry, outside: socket.socket, local: socket.socket) -> None:
        now = time.monotonic()
        if order.host is not None:
            tls: Tls = LibraryTls(self._client(order.ca_pem, order.hint), order.host)
            core = Core.client(order.host, order.port, order.path, now)
        elif self._server is not None:
            tls, core = self._server.connection(), Core.server((order.path,), now)
        else:
            outside.close()
            local.close()
            return
        try:
            line = Line(outside, tls, core, now, host=order.host or "", buffer=self.buffer, raw=self._raw)
        except OSError:
            # The connection has gone already.
            outside.close()
            local.close()
            return
        shuttle = Shuttle(line, local, tells=order.host is not None, buffer=self.buffer)
        self._shuttles[shuttle] = [0, 0]
        if order.number:
            self._numbers[order.number] = shuttle
            self._number_of[shuttle] = order.number
        self._step(shuttle)

    def carried(self) -> int:
        """Connections now."""
        return len(self._shuttles)

    def _report(self) -> None:
        self.tell(encode(Report(self.carried(), time.process_time())))

    def tell(self, packet: bytes) -> None:
        """Say something to the starter."""
        try:
            self._line.send(packet)
        except BlockingIOError:
            # A starter that does not read is told later or never; the moving goes on.
            return
        except OSError:
            self._gone = True


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()
    Process(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()

"""Many datagrams in one system call where the kernel can: UDP_SEGMENT when sending, UDP_GRO when receiving (Linux)."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator

from agent.connect.udp import Address, incoming, outgoing

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
# Linux: level and option that have a socket told which datagrams nobody took (ip(7), ipv6(7)).
_RECEIVE_ERRORS = ((socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25))
_MAX_SEGMENTS = 60
_MAX_BYTES = 63_000
_RECEIVE, _ANCILLARY = 65_535, 64
_ERRORS = 64
_BUFFER = 4 * 1024 * 1024


class Datagrams:
    """A UDP socket. `send` never blocks: what the kernel does not take now is lost like any datagram.

    ``refused`` is set, where the system tells (Linux), when a machine said that nobody has the port that was sent to.
    Anybody can make that up: it is a hint, to be taken back by whoever hears from the peer.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._family = sock.family
        self.dropped = 0
        self.refused = False
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self._segments = True
        for level, option in _RECEIVE_ERRORS if sys.platform == "linux" else ():
            # A socket for IPv4 alone has none for IPv6.
            with contextlib.suppress(OSError):
                sock.setsockopt(level, option, 1)
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)

    def send(self, datagrams: Iterable[tuple[bytes, Address]]) -> OSError | None:
        """Send all; the last error of the network (not of a full buffer), if there was one."""
        trouble: OSError | None = None
        for run, address in _runs(datagrams):
            try:
                self._send_run(run, outgoing(self._family, address))
            except BlockingIOError:
                self.dropped += len(run)
            except OSError as error:
                self._note(error)
                trouble = error
        return trouble

    def _note(self, error: OSError) -> None:
        if error.errno == errno.ECONNREFUSED:
            self.refused = True
        self._drain()

    def _drain(self) -> None:
        """Drop what the kernel keeps of errors, which makes the socket seem readable."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                for _ in range(_ERRORS):
                    self.sock.recvmsg(1, _ANCILLARY, socket.MSG_ERRQUEUE)

    def _send_run(self, run: list[bytes], address: Address) -> None:
        if len(run) > 1 and self._segments:
            whole, size = b"".join(run), struct.pack("=H", len(run[0]))
            for _ in range(2):
                try:
                    self.sock.sendmsg([whole], [(_SOL_UDP, _UDP_SEGMENT, size)], 0, address)
                except BlockingIOError:
                    raise
                except OSError as error:
                    # The first one may belong to what was sent before.
                    self._note(error)
                else:
                    return
            # No such option here, or a path that cannot take it: one by one from now on.
            self._segments = False
        for datagram in run:
            self.sock.sendto(datagram, address)

    def receive(self, most: int = 16) -> Iterator[tuple[bytes, int, Address]]:
        """What has come, up to ``most`` calls' worth: data, length of its segments (0 for one datagram), sender."""
        for turn in range(most):
            try:
                data, ancillary, _, address = self.sock.recvmsg(_RECEIVE, _ANCILLARY)
            except BlockingIOError:
                if turn == 0:
                    self._drain()
                return
            except OSError as error:
                # A refused or unreachable destination is reported here; QUIC finds out by itself, but late.
                self._note(error)
                continue
            segment = 0
            for level, kind, payload in ancillary:
                if (level, kind) == (_SOL_UDP, _UDP_GRO):
                    segment = int.from_bytes(payload[:2], "little")
            yield data, segment, incoming(address)


def _runs(datagrams: Iterable[tuple[bytes, Address]]) -> Iterator[tuple[list[bytes], Address]]:
    """Datagrams in a row to one address, all as long as the first, only the last one shorter."""
    run: list[bytes] = []
    target: Address | None = None
    total = 0
    for data, address in datagrams:
        fits = (
            run
            and address == target
            and len(data) <= len(run[0]) == len(run[-1])
            and len(run) < _MAX_SEGMENTS
            and total + len(data) <= _MAX_BYTES
        )
        if run and not fits:
            assert target is not None
            yield run, target
            run, total = [], 0
        run.append(data)
        target = address
        total += len(data)
    if run:
        assert target is not None
        yield run, target

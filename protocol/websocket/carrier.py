"""Runs the process that carries WebSocket connections, and hands it sockets.

How the relay knows whom to hand over before it has spoken a word of TLS: an agent with a tunnel offers the application
protocols ``http/1.1`` and ``http/1.0``, both registered and real HTTP to everything that inspects, and together
offered by nobody else; an operator's reverse proxy calls for tunnels by a name of their own (`orders.SERVER_NAME`).
Where something on the way rewrites that, the relay serves the connection more slowly itself.
"""

from __future__ import annotations

import array
import logging
import socket
from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from protocol.errors import RetryLater
from protocol.line_process import line_process
from protocol.websocket.orders import MAX_PACKET, Carry, Report, Serve, decode_report, encode

_logger = logging.getLogger("towpath.websocket")

RESTART_PAUSE = 1.0
_SEND_TIMEOUT = 5.0
_START_TIMEOUT = 10.0


class HasDescriptor(Protocol):
    """A socket of whatever library."""

    def fileno(self) -> int: ...


class CarrierUnavailable(RetryLater):
    """The process is not there now."""

    default_code = "WEBSOCKET_UNAVAILABLE"


@dataclass(frozen=True)
class CarrierStatistics:
    """Connections now and since the start; CPU seconds of the process; how often another one had to be started."""

    connections: int
    carried: int
    cpu: float
    restarts: int


class Carrier:
    """Run `run`; the process starts when it is first wanted, or at `serve`, and is started again when it dies."""

    def __init__(self, module: str = "protocol.websocket.process") -> None:
        self._module = module
        self._line: trio.socket.SocketType | None = None
        self._serve: Serve | None = None
        # The process has not been told of the last `serve`.
        self.behind = False
        self._wanted = trio.Event()
        self._changed = trio.Event()
        self._sending = trio.Lock()
        self._report = Report(0, 0.0)
        self._carried = 0
        self._restarts = 0

    @property
    def is_up(self) -> bool:
        """Whether `carry` would go at once."""
        return self._line is not None

    def statistics(self) -> CarrierStatistics:
        """Counts."""
        return CarrierStatistics(self._report.connections, self._carried, self._report.cpu, self._restarts)

    def want(self) -> None:
        """Have the process started: it is about to be needed."""
        self._wanted.set()

    async def serve(self, certificate: str, key: str | None) -> None:
        """Be the server with the certificate and key in these files; call it again when they have changed, or when this
        raised `CarrierUnavailable`: then the process, though not another one, is `behind`."""
        self._serve, self.behind = Serve(certificate, key), True
        self.want()
        if self._line is not None:
            await self.send(encode(self._serve), ())
            self.behind = False

    async def carry(self, order: Carry, outside: HasDescriptor, local: HasDescriptor) -> int:
        """Hand two sockets over; the caller's own descriptors of them may be closed then. The number of the connection.

        Raises `CarrierUnavailable`.
        """
        self.want()
        with trio.move_on_after(_START_TIMEOUT):
            while self._line is None:
                await self._changed.wait()
        self._carried += 1
        number = self._carried
        await self.send(encode(msgspec.structs.replace(order, number=number)), (outside, local))
        return number

    async def send(self, packet: bytes, sockets: tuple[HasDescriptor, ...]) -> None:
        """Say something to the process. Raises `CarrierUnavailable`."""
        numbers = array.array("i", [sock.fileno() for sock in sockets]).tobytes()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        try:
            with trio.fail_after(_SEND_TIMEOUT):
                async with self._sending:
                    if self._line is None:
                        raise CarrierUnavailable("The process for WebSocket is starting; it is tried again.")
                    await self._line.sendmsg([packet], rights)
        except (OSError, trio.TooSlowError) as error:
            raise CarrierUnavailable("The process for WebSocket does not answer; it is tried again.") from error

    async def run(self) -> None:
        """Keep the process running once it is wanted, until cancelled."""
        await self._wanted.wait()
        while True:
            try:
                await self._keep_one()
            except OSError as error:
                # No process or descriptor is to be had, or it ended before it was told anything.
                _logger.error("The process for WebSocket cannot be started, and is tried again: %s", error)
            else:
                _logger.error("The process for WebSocket ended unexpectedly; another one is started.")
            self._restarts += 1
            await trio.sleep(RESTART_PAUSE)

    async def _keep_one(self) -> None:
        async with line_process(self._module, room=2 * MAX_PACKET) as line:
            for packet in self.beginning():
                await line.send(packet)
            self._line, self.behind = line, False
            self._tell()
            try:
                await self._hear(line)
            finally:
                self._line = None
                self._tell()
                self.ended()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _hear(self, line: trio.socket.SocketType) -> None:
        while True:
            try:
                packet = await line.recv(MAX_PACKET)
            except OSError:
                return
            if not packet:
                return
            self.take_report(packet)

    # --- for those that build on it --------------------------------------------------------------------------

    def beginning(self) -> list[bytes]:
        """What a new process is told first."""
        return [] if self._serve is None else [encode(self._serve)]

    def take_report(self, packet: bytes) -> None:
        """What the process says."""
        self.take_count(decode_report(packet))

    def take_count(self, report: Report) -> None:
        """How many connections it carries."""
        self._report = report

    def ended(self) -> None:
        """The process has ended."""


def local_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a local stream, with room for what TLS sends at once."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 512 * 1024)
    return pair

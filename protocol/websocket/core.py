"""A byte stream in both directions inside one WebSocket connection. Sans I/O; ``now`` is monotonic seconds.

Binary messages are the stream, in order and without meaning of their own; the text message `END` is the end of its
sender's direction, because WebSocket itself ends both at once. Nothing is negotiated: no extensions, no compression,
one subprotocol. A request with an ``Origin`` comes from a page in a browser and is refused. Masking is the library's,
in C, where the plain language would take two CPU seconds a GiB.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from protocol.errors import ProtocolError, RetryLater
from protocol.reverse_http.limits import Budget

SUBPROTOCOL = Subprotocol("towpath-stream.1")
END = "end"
# The most that is sent as one message, and the longest that is taken.
MESSAGE = 128 * 1024
MAX_MESSAGE = 256 * 1024
# Bytes fed at once: what a peer can make of them in frames and answers stays small.
FEED = 64 * 1024
# A frame costs one; content earns. Empty frames and pings may come in a burst and at a rate, then they are a flood.
_FRAMES, _FRAMES_A_SECOND, _BYTES_A_FRAME = 4000, 1000, 256
# The library says much at its lower levels.
_logger = logging.getLogger("towpath.websocket")
_logger.setLevel(logging.WARNING)


class WebSocketRefused(RetryLater):
    """What answers is no relay that speaks WebSocket, or refuses to."""

    default_code = "WEBSOCKET_REFUSED"


class Core:
    """One connection; make it with `client` or `server`. Feed `receive_untrusted`, send what `take` gives."""

    def __init__(self, protocol: ClientProtocol | ServerProtocol, paths: tuple[str, ...], now: float) -> None:
        self._protocol = protocol
        self._paths = paths
        self._frames = Budget(_FRAMES, _FRAMES_A_SECOND, now)
        # What has come of the peer's stream.
        self.incoming: deque[bytes | bytearray] = deque()
        # The peer's stream is complete; this side's is.
        self.peer_ended = False
        self.ended = False
        # What the client asked for.
        self.path = ""
        self._asked: Request | None = None
        self.heard = now

    @classmethod
    def client(cls, host: str, port: int, path: str, now: float, headers: Mapping[str, str] | None = None) -> Core:
        """The client's end; its request waits to be sent."""
        protocol = ClientProtocol(
            WebSocketURI(True, host, port, path, ""),
            subprotocols=[SUBPROTOCOL],
            max_size=MAX_MESSAGE,
            logger=_logger,
        )
        request = protocol.connect()
        for name, value in (headers or {}).items():
            request.headers[name] = value
        protocol.send_request(request)
        core = cls(protocol, (path,), now)
        core.path = path
        return core

    @classmethod
    def server(cls, paths: tuple[str, ...], now: float) -> Core:
        """The server's end, for these paths only."""
        protocol = ServerProtocol(
            origins=[None], extensions=None, subprotocols=[SUBPROTOCOL], max_size=MAX_MESSAGE, logger=_logger
        )
        return cls(protocol, paths, now)

    @property
    def is_open(self) -> bool:
        """Whether the opening handshake is done and no close has come or gone."""
        return self._protocol.state is State.OPEN

    @property
    def is_opening(self) -> bool:
        """Whether the opening handshake is under way."""
        return self._protocol.state is State.CONNECTING

    def header(self, name: str) -> tuple[str, ...]:
        """At a server: the values of a header of the client's request, in their order. Their length is bounded by that
        of the request, nothing else is known of them."""
        return () if self._asked is None else tuple(self._asked.headers.get_all(name))

    # --- from the peer ---------------------------------------------------------------------------------------

    def receive_untrusted(self, data: bytes | bytearray, now: float) -> None:
        """Take in what came, at most `FEED` bytes at once; empty is the end of the connection.

        Raises `ProtocolError` for what breaks the rules, with the reason to be sent still in `take`, and for a client
        `WebSocketRefused` when the other side does not open.
        """
        self.heard = now
        if self._protocol.state is State.CLOSED:
            return
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._frame(event, now)
            elif isinstance(event, Request):
                self._request(event)
        self._raise_trouble(bool(data))

    def _raise_trouble(self, more: bool) -> None:
        if self._protocol.handshake_exc is not None:
            if isinstance(self._protocol, ClientProtocol):
                raise WebSocketRefused(_refusal(self._protocol.handshake_exc)) from self._protocol.handshake_exc
            raise ProtocolError("The caller's request for a WebSocket is not one that is answered.")
        if self._protocol.parser_exc is not None and more:
            raise ProtocolError(f"The other side broke the rules of WebSocket: {self._protocol.parser_exc}.")

    def _request(self, request: Request) -> None:
        assert isinstance(self._protocol, ServerProtocol)
        self.path = request.path.partition("?")[0]
        self._asked = request
        response: Response
        if self.path not in self._paths:
            response = self._protocol.reject(HTTPStatus.NOT_FOUND, "There is nothing here.\n")
        else:
            response = self._protocol.accept(request)
            if response.status_code == 101 and self._protocol.subprotocol != SUBPROTOCOL:
                response = self._protocol.reject(HTTPStatus.BAD_REQUEST, f"Only {SUBPROTOCOL} is spoken here.\n")
        self._protocol.send_response(response)
        if response.status_code != 101:
            raise ProtocolError("The caller's request for a WebSocket is not one that is answered.")

    def _frame(self, frame: Frame, now: float) -> None:
        if not self._frames.spend(now):
            self._protocol.fail(CloseCode.POLICY_VIOLATION, "too many frames")
            raise ProtocolError("The other side floods this one with frames.")
        if frame.opcode in (Opcode.BINARY, Opcode.CONT):
            if self.peer_ended:
                raise ProtocolError("The other side sends more behind the end of its stream.")
            if frame.data:
                self._frames.earn(len(frame.data) / _BYTES_A_FRAME)
                self.incoming.append(bytes(frame.data) if isinstance(frame.data, memoryview) else frame.data)
        elif frame.opcode is Opcode.TEXT:
            if bytes(frame.data) != END.encode() or not frame.fin or self.peer_ended:
                raise ProtocolError("The other side says something that is not understood.")
            self.peer_ended = True

    # --- to the peer -----------------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Queue a part of the stream, in messages. Call it only while `is_open` and before `end`."""
        view = memoryview(data)
        for start in range(0, len(view), MESSAGE):
            self._protocol.send_binary(view[start : start + MESSAGE])

    def end(self) -> None:
        """This side's stream is complete."""
        if not self.ended and self.is_open:
            self.ended = True
            self._protocol.send_text(END.encode())

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self.is_open:
            self._protocol.send_ping(b"")

    def close(self) -> None:
        """Say goodbye, when there is somebody to say it to."""
        if self.is_open:
            self._protocol.send_close(CloseCode.NORMAL_CLOSURE)

    def take(self) -> bytes:
        """All that is to be sent now."""
        return b"".join(self._protocol.data_to_send())


def _refusal(error: Exception) -> str:
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        return f"WebSocket to the relay is refused (HTTP status {status}), by the relay or by something in between."
    if isinstance(error, InvalidMessage):
        return "What answers at the relay's address does not speak HTTP."
    if isinstance(error, InvalidHandshake):
        return f"WebSocket to the relay does not open: {error}."
    return "WebSocket to the relay does not open."

"""A byte stream in both directions inside one WebSocket connection. Sans I/O; ``now`` is monotonic seconds.

Binary messages are the stream, in order and without meaning of their own; the text message `END` is the end of its
sender's direction, because WebSocket itself ends both at once. Nothing is negotiated: no extensions, no compression,
one subprotocol. A request with an ``Origin`` comes from a page in a browser and is refused. The opening handshake is
the library's; frames are taken apart in `protocol.websocket.frames`, which copies less.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from protocol.errors import ProtocolError, RetryLater
from protocol.reverse_http.limits import Budget
from protocol.websocket.frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, Buffer, Parser, frame

SUBPROTOCOL = Subprotocol("towpath-stream.1")
END = b"end"
# The most that is sent as one message, and the longest that is taken.
MESSAGE = 256 * 1024
MAX_MESSAGE = 1024 * 1024
# Bytes fed at once: what a peer can make of them in frames and answers stays small.
FEED = 256 * 1024
_HANDSHAKE_END = b"\r\n\r\n"
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
        # For the opening handshake.
        self._protocol = protocol
        self._paths = paths
        self._is_client = isinstance(protocol, ClientProtocol)
        # The end of what came of the peer's handshake, in which its end may begin.
        self._tail = b""
        self._parser: Parser | None = None
        self._closed = False
        self._out: list[Buffer] = []
        self._frames = Budget(_FRAMES, _FRAMES_A_SECOND, now)
        # What has come of the peer's stream.
        self.incoming: deque[bytes] = deque()
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
        protocol = ClientProtocol(WebSocketURI(True, host, port, path, ""), subprotocols=[SUBPROTOCOL], logger=_logger)
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
        protocol = ServerProtocol(origins=[None], extensions=None, subprotocols=[SUBPROTOCOL], logger=_logger)
        return cls(protocol, paths, now)

    @property
    def is_open(self) -> bool:
        """Whether the opening handshake is done and no close has come or gone."""
        return self._parser is not None and not self._closed

    @property
    def is_opening(self) -> bool:
        """Whether the opening handshake is under way."""
        return self._parser is None and self._protocol.state is State.CONNECTING

    def header(self, name: str) -> tuple[str, ...]:
        """At a server: the values of a header of the client's request, in their order. Their length is bounded by that
        of the request, nothing else is known of them."""
        return () if self._asked is None else tuple(self._asked.headers.get_all(name))

    # --- from the peer ---------------------------------------------------------------------------------------

    def receive_untrusted(self, data: Buffer, now: float) -> None:
        """Take in what came, at most `FEED` bytes at once; empty is the end of the connection.

        Raises `ProtocolError` for what breaks the rules, with the reason to be sent still in `take`, and for a client
        `WebSocketRefused` when the other side does not open.
        """
        self.heard = now
        if self._closed:
            return
        if self._parser is None:
            data = self._shake_hands(bytes(data))
        elif not data:
            self._closed = True
        if self._parser is None:
            return
        try:
            for opcode, payload, last in self._parser.feed_untrusted(data):
                self._frame(opcode, payload, last, now)
                if self._closed:
                    return
        except ProtocolError:
            self._goodbye(CloseCode.PROTOCOL_ERROR)
            raise

    def _shake_hands(self, data: bytes) -> bytes:
        """Feed the library as far as the handshake goes; what comes behind it."""
        # Where the handshake ends, in what has come: the library is to see nothing behind it.
        end = (self._tail + data).find(_HANDSHAKE_END)
        size = len(data) if end < 0 else end + len(_HANDSHAKE_END) - len(self._tail)
        self._tail = (self._tail + data)[-3:]
        self._feed_library(data[:size])
        if self._protocol.state is State.OPEN:
            self._parser = Parser(masked=not self._is_client, longest=MAX_MESSAGE)
            return data[size:]
        if data[size:]:
            # The rest of an answer that is no WebSocket's.
            self._feed_library(data[size:])
        return b""

    def _feed_library(self, data: bytes) -> None:
        if self._protocol.state is State.CLOSED:
            return
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Request):
                self._request(event)
        if self._protocol.handshake_exc is not None:
            if self._is_client:
                raise WebSocketRefused(_refusal(self._protocol.handshake_exc)) from self._protocol.handshake_exc
            raise ProtocolError("The caller's request for a WebSocket is not one that is answered.")
        if self._protocol.parser_exc is not None and data:
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

    def _frame(self, opcode: int, payload: bytes, last: bool, now: float) -> None:
        if last and not self._frames.spend(now):
            raise ProtocolError("The other side floods this one with frames.")
        if opcode in (BINARY, CONT):
            if self.peer_ended:
                raise ProtocolError("The other side sends more behind the end of its stream.")
            if payload:
                self._frames.earn(len(payload) / _BYTES_A_FRAME)
                self.incoming.append(payload)
        elif opcode == TEXT:
            if payload != END or self.peer_ended:
                raise ProtocolError("The other side says something that is not understood.")
            self.peer_ended = True
        elif opcode == PING:
            self._send(PONG, payload)
        elif opcode == CLOSE:
            self._goodbye(CloseCode.NORMAL_CLOSURE)

    # --- to the peer -----------------------------------------------------------------------------------------

    def send(self, data: Buffer) -> None:
        """Queue a part of the stream, in messages. Call it only while `is_open` and before `end`. At a server it is not
        copied: what `take_parts` gives then is part of ``data``."""
        view = memoryview(data)
        for start in range(0, len(view), MESSAGE):
            self._send(BINARY, view[start : start + MESSAGE])

    def end(self) -> None:
        """This side's stream is complete."""
        if not self.ended and self.is_open:
            self.ended = True
            self._send(TEXT, END)

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self.is_open:
            self._send(PING, b"")

    def close(self) -> None:
        """Say goodbye, when there is somebody to say it to."""
        self._goodbye(CloseCode.NORMAL_CLOSURE)

    def _goodbye(self, code: CloseCode) -> None:
        if self.is_open:
            self._send(CLOSE, code.to_bytes(2, "big"))
            self._closed = True

    def _send(self, opcode: int, payload: Buffer) -> None:
        self._out += frame(opcode, payload, masked=self._is_client)

    def take_parts(self) -> list[Buffer]:
        """All that is to be sent now, in order."""
        parts: list[Buffer] = [part for part in self._protocol.data_to_send() if part]
        parts += self._out
        self._out = []
        return parts

    def take(self) -> bytes:
        """The same as one."""
        return b"".join(self.take_parts())


def _refusal(error: Exception) -> str:
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        return f"WebSocket to the relay is refused (HTTP status {status}), by the relay or by something in between."
    if isinstance(error, InvalidMessage):
        return "What answers at the relay's address does not speak HTTP."
    if isinstance(error, InvalidHandshake):
        return f"WebSocket to the relay does not open: {error}."
    return "WebSocket to the relay does not open."

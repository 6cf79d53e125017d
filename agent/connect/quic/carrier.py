"""Carries local stream sockets over one QUIC connection: the loop of a process of its own (`process`).

Each QUIC stream beyond the introduction is joined with one end of a socket pair; whoever has the other end speaks TLS
on it as on a TCP connection. A stream that is given up, or a connection that ends, closes the local end without TLS's
goodbye, so it cannot be taken for a regular end.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.connect.quic.credit import (
    CREDIT,
    END_FRAME,
    MAX_CONTENT,
    OPEN_FRAME,
    WINDOW,
    Receiver,
    Sender,
    content_header,
)
from agent.connect.quic.datagrams import Datagrams
from agent.connect.quic.engine import (
    PING_EVERY,
    Closed,
    Engine,
    StreamData,
    StreamReset,
    Up,
    now,
)
from agent.connect.quic.introduction import ClientIntroduction, ServerIntroduction, ServerLook
from agent.connect.udp import Address
from protocol.errors import ProtocolError, TowpathError

MAX_STREAMS = 64
# The handshake and the introduction take no longer than this.
INTRODUCTION_TIMEOUT = 15.0
# A client that waits for something says something itself after so long a silence; where the server's machine then says
# that nobody has its port any more, it asks again every so often, and takes it for gone if that is all it hears for so
# long (seconds). A server that was killed is so found missing well before its silence tells.
QUIET, ASK_AGAIN, REFUSED_PATIENCE = 1.0, 0.25, 0.75
# A server that somebody else says may have been started again has so long for any word (seconds): it is asked every
# ASK_AGAIN, and one that has been silent for so long altogether is gone. One that is there is heard every second.
DOUBT_PATIENCE, DOUBTED_SILENCE = 0.5, 2.0
_CHUNK = 64 * 1024
# Local reads in a row before the network has its turn.
_READS = 8


class ConnectionOver(Exception):
    """The QUIC connection ended; the sentence says why."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence


@dataclass(eq=False)
class _Stream:
    number: int
    sock: socket.socket
    sender: Sender = field(default_factory=Sender)
    receiver: Receiver = field(default_factory=Receiver)
    # Content that the local end has not taken yet; bounded by the credit given.
    waiting: deque[memoryview] = field(default_factory=deque)
    local_ended: bool = False
    shut: bool = False
    finished: bool = False
    interest: int = 0


class Carrier:
    """One connection. ``on_up`` is called when the introduction is over, ``on_stream`` with the far end of each stream
    the peer opens (it owns the socket). Create it, then call `turn` until it raises `ConnectionOver`."""

    def __init__(
        self,
        engine: Engine,
        datagrams: Datagrams,
        introduction: ClientIntroduction | ServerIntroduction | ServerLook,
        on_up: Callable[[], None],
        on_stream: Callable[[socket.socket], None],
    ) -> None:
        self._engine = engine
        self._datagrams = datagrams
        self._introduction = introduction
        self._on_up = on_up
        self._on_stream = on_stream
        self._streams: dict[int, _Stream] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(datagrams.sock, selectors.EVENT_READ)
        self._deadline = now() + INTRODUCTION_TIMEOUT
        self._next_ping = now() + PING_EVERY
        self._heard = now()
        # Since when nothing but refusals has come.
        self._refused: float | None = None
        # Since when the server is doubted to be there, and nothing has come.
        self._doubted: float | None = None
        # Whether the server's agent is known to have been started again since.
        self._outlived = False
        self._newest = 0
        # Where the server of this client is: what comes from elsewhere is nothing (RFC 9000, section 9).
        self._server: Address | None = None
        self.is_up = False
        self.moves = 0

    # --- from outside ----------------------------------------------------------------------------------------

    def connect(self, address: Address) -> None:
        """Client: begin."""
        self._server = address
        self._engine.connect(address, now())
        self._flush()

    def watch(self, sock: socket.socket) -> None:
        """Have `turn` return True when this socket is readable."""
        self._selector.register(sock, selectors.EVENT_READ, "watched")

    def open_stream(self) -> socket.socket:
        """Client, once up: a new stream; its far end, which the caller owns."""
        number = self._engine.open_stream()
        far = self._join(number)
        # The peer learns of a stream with its first bytes.
        self._engine.send(number, OPEN_FRAME)
        self._flush()
        return far

    def move(self, sock: socket.socket) -> None:
        """Go on from another socket: the old one's network is gone. Everything on the way is sent again by QUIC."""
        self._selector.unregister(self._datagrams.sock)
        self._datagrams.sock.close()
        self._datagrams = Datagrams(sock)
        self._refused = self._doubted = None
        self._selector.register(sock, selectors.EVENT_READ)
        self._engine.move()
        self._engine.ping()
        self.moves += 1
        self._flush()

    def doubt(self, instance: str = "") -> None:
        """Client: the server may have been started again. If its agent is another ``instance`` now than the one that
        introduced itself, the connection is over; where that cannot be told, if it does not say anything soon."""
        introduction = self._introduction
        if not self.is_up or not isinstance(introduction, ClientIntroduction):
            return
        if instance and introduction.instance:
            self._outlived = instance != introduction.instance
        elif self._doubted is None:
            self._doubted = now()
        # Weighed in the next turn, which waits for nothing then.
        self._next_ping = now()

    def close(self, reason: str) -> None:
        """Say goodbye and close everything."""
        with contextlib.suppress(TowpathError):
            self._engine.close(reason)
            self._flush()
        for stream in list(self._streams.values()):
            self._drop(stream)
        self._selector.close()
        self._datagrams.sock.close()

    # --- the loop --------------------------------------------------------------------------------------------

    def turn(self, longest: float) -> bool:
        """Wait for something, up to ``longest`` seconds, and deal with it; whether a watched socket is readable.

        Raises `ConnectionOver`.
        """
        try:
            return self._turn(longest)
        except TowpathError as error:
            self._engine.close(error.sentence)
            with contextlib.suppress(TowpathError):
                self._flush()
            raise ConnectionOver(error.sentence) from error

    def _turn(self, longest: float) -> bool:
        watched = False
        for key, events in self._selector.select(self._patience(longest)):
            if key.data == "watched":
                watched = True
            elif key.data is None:
                self._read_network()
            else:
                if events & selectors.EVENT_WRITE:
                    self._write_local(key.data)
                if events & selectors.EVENT_READ:
                    self._read_local(key.data)
        moment = now()
        timer = self._engine.timer()
        if timer is not None and timer <= moment:
            self._engine.handle_timer(moment)
        if moment >= self._next_ping:
            self._next_ping = moment + (ASK_AGAIN if self._refused or self._doubted else PING_EVERY)
            self._engine.ping()
        if not self.is_up and moment >= self._deadline:
            raise ConnectionOver("The peer did not introduce itself over QUIC in time.")
        self._take_events()
        self._flush()
        self._weigh(moment)
        return watched

    def _weigh(self, moment: float) -> None:
        """What speaks for it that the server is gone."""
        doubted = self._doubted
        silent = doubted is not None and moment >= max(doubted + DOUBT_PATIENCE, self._heard + DOUBTED_SILENCE)
        if silent or self._outlived:
            raise ConnectionOver("The peer's agent has been started again, and knows nothing of this connection.")
        if not (self._datagrams.refused and self.is_up and self._engine.is_client):
            return
        self._datagrams.refused = False
        if self._refused is None:
            self._refused = moment
            self._next_ping = moment + ASK_AGAIN
        elif moment - self._refused >= REFUSED_PATIENCE:
            raise ConnectionOver("The peer's agent is gone: its machine says that nobody has the port any more.")

    def _patience(self, longest: float) -> float:
        moment = now()
        until = min(moment + longest, self._next_ping)
        if not self.is_up:
            until = min(until, self._deadline)
        timer = self._engine.timer()
        return max(0.0, (until if timer is None else min(until, timer)) - moment)

    def _read_network(self) -> None:
        for data, segment, address in self._datagrams.receive():
            if self._server is not None and address != self._server:
                continue
            self._heard = now()
            self._engine.receive(data, segment, address, self._heard)
            self._refused = self._doubted = None
            self._datagrams.refused = False
            if self._engine.is_client and self._streams:
                self._next_ping = now() + QUIET

    def _flush(self) -> None:
        self._datagrams.send(self._engine.datagrams(now()))

    def _take_events(self) -> None:
        for event in self._engine.events():
            if isinstance(event, StreamData):
                self._stream_data(event)
            elif isinstance(event, StreamReset):
                if (stream := self._streams.get(event.stream)) is not None:
                    self._drop(stream)
            elif isinstance(event, Up):
                if isinstance(self._introduction, ClientIntroduction):
                    self._introduce(self._introduction.up_untrusted(event.certificate))
            elif isinstance(event, Closed):
                raise ConnectionOver(event.reason)

    # --- streams ---------------------------------------------------------------------------------------------

    def _introduce(self, answer: bytes) -> None:
        if answer:
            self._engine.send(0, answer)
        if self._introduction.done and not self.is_up:
            self.is_up = True
            self._on_up()

    def _stream_data(self, event: StreamData) -> None:
        if event.stream == 0:
            self._introduce(self._introduction.feed_untrusted(event.data))
            return
        if not self.is_up:
            raise ProtocolError("The peer sent content over QUIC before it introduced itself.")
        stream = self._streams.get(event.stream)
        if stream is None:
            # Only the client opens streams, in both directions; what is gone already is of no interest.
            if self._engine.is_client or event.stream % 4 != 0 or event.stream <= self._newest:
                return
            if len(self._streams) >= MAX_STREAMS:
                raise ProtocolError("The peer opens too many streams over QUIC.")
            self._newest = event.stream
            self._on_stream(self._join(event.stream))
            stream = self._streams[event.stream]
        for kind, number, content in stream.receiver.feed_untrusted(event.data):
            if kind == CREDIT:
                # Zero only opens the stream.
                if number:
                    stream.sender.credit_untrusted(number)
            else:
                stream.waiting.append(memoryview(content))
        if event.end and not (stream.receiver.ended and stream.local_ended):
            # Not an end but a break: both directions have not said that they are over.
            self._give_up(stream)
            return
        self._write_local(stream)

    def _join(self, number: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        stream = self._streams[number] = _Stream(number, ours)
        self._selector.register(ours, selectors.EVENT_READ, stream)
        stream.interest = selectors.EVENT_READ
        return theirs

    def _read_local(self, stream: _Stream) -> None:
        for _ in range(_READS):
            most = min(_CHUNK, stream.sender.left, MAX_CONTENT)
            if most <= 0 or stream.local_ended or stream.finished:
                break
            try:
                data = stream.sock.recv(most)
            except BlockingIOError:
                break
            except OSError:
                self._give_up(stream)
                return
            if not data:
                stream.local_ended = True
                self._engine.send(stream.number, END_FRAME)
                break
            stream.sender.sent(len(data))
            self._engine.send(stream.number, content_header(len(data)) + data)
        self._settle(stream)

    def _write_local(self, stream: _Stream) -> None:
        taken = 0
        try:
            while stream.waiting and not stream.finished:
                piece = stream.waiting[0]
                sent = stream.sock.send(piece)
                taken += sent
                if sent < len(piece):
                    stream.waiting[0] = piece[sent:]
                else:
                    stream.waiting.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._give_up(stream)
            return
        credit = stream.receiver.taken(taken) if taken else b""
        if credit:
            self._engine.send(stream.number, credit)
        self._settle(stream)

    def _settle(self, stream: _Stream) -> None:
        """Bring what is waited for up to date; close a stream that is over."""
        if stream.finished:
            return
        if stream.receiver.ended and not stream.waiting:
            if stream.local_ended:
                self._engine.send(stream.number, b"", end=True)
                self._drop(stream)
                return
            if not stream.shut:
                stream.shut = True
                try:
                    stream.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    self._give_up(stream)
                    return
        interest = 0
        if not stream.local_ended and stream.sender.left > 0:
            interest |= selectors.EVENT_READ
        if stream.waiting:
            interest |= selectors.EVENT_WRITE
        if interest == stream.interest:
            return
        if not interest:
            self._selector.unregister(stream.sock)
        elif not stream.interest:
            self._selector.register(stream.sock, interest, stream)
        else:
            self._selector.modify(stream.sock, interest, stream)
        stream.interest = interest

    def _give_up(self, stream: _Stream) -> None:
        """The local end broke: tell the peer."""
        if not stream.finished:
            self._engine.reset(stream.number)
        self._drop(stream)

    def _drop(self, stream: _Stream) -> None:
        if stream.finished:
            return
        stream.finished = True
        if stream.interest:
            self._selector.unregister(stream.sock)
        stream.sock.close()
        self._streams.pop(stream.number, None)

    def open_streams(self) -> int:
        """Streams that are not over."""
        return len(self._streams)


assert MAX_CONTENT <= WINDOW

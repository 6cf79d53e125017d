"""The process that carries one QUIC connection for the daemon, so that the daemon stays responsive. Composition only.

Started as ``python -m agent.connect.quic.process FD`` with one end of a SOCK_SEQPACKET pair; each packet is one
message, with at most one descriptor. It ends with its connection, or when the daemon closes its end.
"""

from __future__ import annotations

import signal
import socket
import sys

import msgspec

from agent.connect.quic.carrier import Carrier, ConnectionOver
from agent.connect.quic.datagrams import Datagrams
from agent.connect.quic.engine import Engine, now
from agent.connect.quic.introduction import ClientIntroduction, ClientLook, ServerIntroduction, ServerLook
from agent.system.limits import bound_memory
from protocol.errors import TowpathError
from protocol.identity import NodeKey

MAX_PACKET = 64 * 1024
# A connection without streams is kept so long (seconds), in case another lane is wanted.
IDLE = 60.0
# A peer that has shown who it is can still make a library keep a lot (qh3 2.1 keeps an answer to every PATH_CHALLENGE
# that was not acknowledged). A process that takes more than this (bytes; windows and credits need a third of it) ends.
MEMORY = 768 * 1024 * 1024


class Begin(msgspec.Struct, frozen=True, tag="begin", kw_only=True):
    """First message, with the UDP socket. ``peer`` is set for the client, who begins; ``known`` for the server: where
    the client was found, and begins from; and ``instance``: what it says of itself. With ``look`` only the handshake is
    wanted, to see that QUIC works; a server then needs no certificate of its peer."""

    session_id: str
    node_key: bytes
    peer_certificate: str
    peer: tuple[str, int] | None = None
    known: tuple[tuple[str, int], ...] = ()
    look: bool = False
    library: str | None = None
    instance: str = ""
    memory: int = MEMORY


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Client: open a stream; answered by `Stream`."""


class Move(msgspec.Struct, frozen=True, tag="move"):
    """Go on from the UDP socket that comes with this: the network has changed."""


class Doubt(msgspec.Struct, frozen=True, tag="doubt"):
    """Client: find out soon whether the peer is still there; at once where it said another ``instance`` of itself than
    there is now."""

    instance: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The two ends know each other."""


class Stream(msgspec.Struct, frozen=True, tag="stream"):
    """A stream, with its local socket."""


class Over(msgspec.Struct, frozen=True, tag="over"):
    """The connection ended."""

    sentence: str


ToProcess = Begin | Open | Move | Doubt
ToDaemon = Ready | Stream | Over

_orders = msgspec.msgpack.Decoder(ToProcess)
_reports = msgspec.msgpack.Decoder(ToDaemon)
encode = msgspec.msgpack.Encoder().encode


def decode_report(packet: bytes) -> ToDaemon:
    """What the process says."""
    report: ToDaemon = _reports.decode(packet)
    return report


class _Gone(Exception):
    """The daemon is gone."""


def _introduction(begin: Begin, identity: NodeKey) -> ClientIntroduction | ServerIntroduction | ServerLook:
    if begin.look and begin.peer is None:
        return ServerLook()
    if begin.peer is None:
        return ServerIntroduction(begin.session_id, identity, begin.peer_certificate, begin.instance)
    introduce = ClientLook if begin.look else ClientIntroduction
    return introduce(begin.session_id, identity, begin.peer_certificate)


class _Process:
    def __init__(self, line: socket.socket) -> None:
        self._line = line
        packet, descriptors, _, _ = socket.recv_fds(line, MAX_PACKET, 1)
        begin = _orders.decode(packet)
        assert isinstance(begin, Begin)
        bound_memory(begin.memory)
        identity = NodeKey.from_pem(begin.node_key)
        is_client = begin.peer is not None
        engine = Engine(
            is_client=is_client,
            certificate_pem=identity.certificate_pem,
            private_key_pem=identity.private_key_pem,
            library=begin.library,
            known=begin.known,
        )
        introduction = _introduction(begin, identity)
        datagrams = Datagrams(socket.socket(fileno=descriptors[0]))
        self._carrier = Carrier(engine, datagrams, introduction, self._up, self._stream)
        self._carrier.watch(line)
        line.setblocking(False)
        if begin.peer is not None:
            self._carrier.connect(begin.peer)

    def run(self) -> None:
        used = now()
        try:
            while now() - used < IDLE:
                if self._carrier.turn(1.0):
                    self._take_order()
                if self._carrier.open_streams() or not self._carrier.is_up:
                    used = now()
            sentence = "The QUIC connection was idle."
        except (ConnectionOver, TowpathError) as error:
            sentence = error.sentence
        except _Gone:
            sentence = "The agent closed the connection."
        self._carrier.close(sentence)
        try:
            self._tell(Over(sentence))
        except _Gone:
            return

    def _take_order(self) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._line, MAX_PACKET, 1)
        except BlockingIOError:
            return
        except OSError as error:
            raise _Gone from error
        if not packet:
            raise _Gone
        order = _orders.decode(packet)
        if isinstance(order, Open):
            self._stream(self._carrier.open_stream())
        elif isinstance(order, Move) and descriptors:
            self._carrier.move(socket.socket(fileno=descriptors[0]))
        elif isinstance(order, Doubt):
            self._carrier.doubt(order.instance)

    def _up(self) -> None:
        self._tell(Ready())

    def _stream(self, far: socket.socket) -> None:
        with far:
            self._tell(Stream(), far)

    def _tell(self, message: ToDaemon, sock: socket.socket | None = None) -> None:
        descriptors = [] if sock is None else [sock.fileno()]
        try:
            socket.send_fds(self._line, [encode(message)], descriptors)
        except OSError as error:
            raise _Gone from error


def main() -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _Process(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()

"""What the process that carries WebSocket connections and its starter say to each other: msgpack, one a packet."""

from __future__ import annotations

import msgspec

from protocol.websocket.paths import TUNNEL_PATH

MAX_PACKET = 160 * 1024
# A caller that offers both of HTTP's older names is an agent with a tunnel (see `protocol.websocket.carrier`).
ALPN = ("http/1.1", "http/1.0")
# The name (SNI) by which an operator's reverse proxy asks for the same: it speaks TLS of its own to the relay, knows by
# a request's path that it is for a tunnel, and can be told to call by another name then. No relay is found by it in any
# network: .internal is nobody's.
SERVER_NAME = "tunnel.towpath.internal"


class Serve(msgspec.Struct, frozen=True, tag="serve"):
    """Be the server with the certificate and key in these files, from now on."""

    certificate: str
    key: str | None = None


class Carry(msgspec.Struct, frozen=True, tag="carry", kw_only=True):
    """Carry a connection: the TCP socket and the local one come with it. Without ``host`` this is the server's end,
    whose client has said nothing that was read. ``ca_pem`` None is the system's trust."""

    host: str | None = None
    port: int = 443
    path: str = TUNNEL_PATH
    ca_pem: str | None = None
    # Whether the relay is to know at once what this is (`ALPN`); where that does not pass, the first name alone may.
    hint: bool = True
    # By which the starter names this connection afterwards; 0 for one that it will not name.
    number: int = 0


class Report(msgspec.Struct, frozen=True, tag="carried"):
    """Connections now, and CPU seconds since the start."""

    connections: int
    cpu: float


_orders = msgspec.msgpack.Decoder(Serve | Carry)
_reports = msgspec.msgpack.Decoder(Report)
encode = msgspec.msgpack.Encoder().encode


def decode_order(packet: bytes) -> Serve | Carry:
    """What the starter says."""
    order: Serve | Carry = _orders.decode(packet)
    return order


def decode_report(packet: bytes) -> Report:
    """What the process says."""
    return _reports.decode(packet)

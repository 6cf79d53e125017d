"""Both kinds of TLS that a server may have under its WebSockets."""

from __future__ import annotations

import ssl
from pathlib import Path

from protocol.websocket.server_tls import ServerContext
from protocol.websocket.tls import LibraryTls, Tls


def library(pem: Path) -> Tls:
    """Python's own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return LibraryTls(context, None)


def opened(pem: Path) -> Tls:
    """pyOpenSSL's."""
    return ServerContext(str(pem), None).connection()

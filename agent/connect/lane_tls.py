"""TLS of a lane: pyOpenSSL, which brings the OpenSSL of the `cryptography` package.

Control streams are secured by Python's `ssl` (`agent.connect.tls`), and on the wire nothing differs. What this one has
for a lane, where TLS is most of the cost: an OpenSSL years newer than the system's, with faster AES-GCM, a choice of
the cipher suite, and one call for a whole block. `docs/performance.md` has the numbers.

No callbacks are used: where a process may have no memory that is writable and executable (systemd's
MemoryDenyWriteExecute) libffi cannot make them. So the serving side does not answer which ALPN name it chose; whoever
dials has offered one, by which the listener has told lanes from control streams (`agent.connect.listener`).
"""

from __future__ import annotations

import socket
import time
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from agent.connect.lane_records import RECORD, Records, as_os_error, patiently, records_of_connection
from agent.connect.tls import HANDSHAKE_TIMEOUT, check_peer
from protocol.identity import NodeKey, fingerprint_of_certificate_untrusted

# The first is the cheapest where AES is in the processor; the others are for peers that want them.
SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
# SSL_MODE_ENABLE_PARTIAL_WRITE (openssl/ssl.h), which pyOpenSSL sets: a call would end with each record of 16 KiB.
_PARTIAL_WRITE = 0x1


def secure_lane(
    sock: socket.socket, identity: NodeKey, peer_certificate: str, *, server_name: str | None, alpn: str
) -> SecuredLane:
    """Do the handshake of a lane: TLS 1.3, our node certificate, one pinned peer. Takes the socket over, and closes it
    when it fails. Blocks, at most `HANDSHAKE_TIMEOUT` in all.

    ``server_name`` is what the dialling side asks for, None at the side that serves. Raises OSError when it fails or
    takes too long, `AccessDenied` for another peer, `ProtocolError` when ``peer_certificate`` cannot be read.
    """
    try:
        return _secured(sock, identity, peer_certificate, server_name, alpn)
    except BaseException:
        sock.close()
        raise


def begin_lane(
    sock: socket.socket, identity: NodeKey, peer_certificate: str, *, server_name: str, alpn: str
) -> SecuringLane:
    """As `secure_lane`, the dialling side, for a socket that never blocks; `SecuringLane.shake_hands` does the
    handshake. Raises `ProtocolError` when ``peer_certificate`` cannot be read."""
    fingerprint = fingerprint_of_certificate_untrusted(peer_certificate)
    connection = SSL.Connection(lane_context(identity, peer_certificate, (alpn,), SUITES), sock)
    connection.set_tlsext_host_name(server_name.encode("ascii"))
    connection.set_connect_state()
    return SecuringLane(connection, sock, fingerprint)


def _secured(
    sock: socket.socket, identity: NodeKey, peer_certificate: str, server_name: str | None, alpn: str
) -> SecuredLane:
    fingerprint = fingerprint_of_certificate_untrusted(peer_certificate)
    connection = SSL.Connection(lane_context(identity, peer_certificate, (alpn,), SUITES), sock)
    if server_name is None:
        connection.set_accept_state()
    else:
        connection.set_tlsext_host_name(server_name.encode("ascii"))
        connection.set_connect_state()
    sock.settimeout(HANDSHAKE_TIMEOUT)
    # The time is for all of it: a peer that drips holds no thread longer.
    patiently(sock, connection.do_handshake, deadline=time.monotonic() + HANDSHAKE_TIMEOUT)
    sock.settimeout(None)
    check_presented(connection, fingerprint)
    return SecuredLane(records_of_connection(connection, sock), sock)


def check_presented(connection: SSL.Connection, fingerprint: str) -> None:
    """Compare who answered in a finished handshake with the pin. Raises `AccessDenied`."""
    presented = connection.get_peer_certificate(as_cryptography=True)
    check_peer(None if presented is None else presented.public_bytes(Encoding.DER), fingerprint)


def lane_context(identity: NodeKey, peer_certificate: str, alpn: tuple[str, ...], suites: bytes) -> SSL.Context:
    """TLS 1.3 with these suites, our node certificate, one pinned peer. Raises `ProtocolError` or OSError."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(suites)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    store = context.get_cert_store()
    if store is None:
        raise OSError("The TLS library has no place for a peer's certificate.")
    # Nothing else is trusted: pyOpenSSL loads no roots unless asked to.
    store.add_cert(crypto.X509.from_cryptography(x509.load_pem_x509_certificate(peer_certificate.encode())))
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    context.use_certificate(x509.load_pem_x509_certificate(identity.certificate_pem.encode()))
    context.use_privatekey(identity.private_key)
    context.set_alpn_protos([name.encode("ascii") for name in alpn])
    # As in `session_context`: no later connection may skip the certificate.
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.clear_mode(_PARTIAL_WRITE)
    return context


class SecuredLane:
    """A lane's connection after its handshake, for blocking use by one thread, with the methods of a socket that lanes
    need. What goes wrong is an OSError; a peer that is gone without a word ends what is read like one that said so, as
    each frame says how long it is."""

    def __init__(self, records: Records | None, sock: socket.socket) -> None:
        self._records = records
        self._socket = sock

    @property
    def records(self) -> int:
        """TLS records that were read, at most."""
        return self._secured.read

    def recv_into(self, view: memoryview, count: int = 0) -> int:
        """Read up to ``count`` bytes (0: as many as fit); 0 at the end."""
        return self._secured.receive(view, min(count, len(view)) if count else len(view))

    def recv(self, count: int) -> bytes:
        """Read up to ``count`` bytes, at most what a record holds; nothing at the end."""
        data = bytearray(min(count, RECORD))
        return bytes(data[: self.recv_into(memoryview(data))])

    def sendall(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        if data:
            self._secured.send(data)

    @property
    def _secured(self) -> Records:
        if self._records is None:
            raise OSError("A lane was used before it was secured.")
        return self._records

    def settimeout(self, seconds: float | None) -> None:
        """As of a socket: for each wait, not for a whole call."""
        self._socket.settimeout(seconds)

    def fileno(self) -> int:
        """The descriptor of the connection, -1 when it is closed."""
        return self._socket.fileno()

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        """As of a socket."""
        return self._socket.getsockopt(level, option, length)

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """As of a socket."""
        self._socket.setsockopt(level, option, value)

    def close(self) -> None:
        """Close the connection without a word, as every lane ends."""
        self._socket.close()


class SecuringLane(SecuredLane):
    """The same on a socket that never blocks, for one thread that serves several."""

    def __init__(self, connection: SSL.Connection, sock: socket.socket, fingerprint: str) -> None:
        super().__init__(None, sock)
        self._connection = connection
        self._fingerprint = fingerprint

    def shake_hands(self) -> Literal["read", "write"] | None:
        """Go on with the handshake: what the socket must be ready for next, None when it is done. Raises OSError,
        `AccessDenied` for another peer."""
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return "read"
        except SSL.WantWriteError:
            return "write"
        except SSL.Error as error:
            raise as_os_error(error) from error
        check_presented(self._connection, self._fingerprint)
        self._records = records_of_connection(self._connection, self._socket)
        return None

    def recv_now(self, view: memoryview, count: int) -> int:
        """As `recv_into`. Raises BlockingIOError when nothing is here."""
        return self.recv_into(view, count)

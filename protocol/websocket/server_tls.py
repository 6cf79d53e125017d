"""The server's end of TLS by pyOpenSSL, which brings the OpenSSL of the `cryptography` package.

Decrypting and encrypting is most of what a tunnel inside WebSocket costs the relay, and this OpenSSL, years newer than
many a system's, takes two thirds of the time (`docs/performance.md`). As for lanes (`agent.connect.lane_tls`), no
callbacks are used, which libffi cannot make where no memory may be writable and executable. So the server does not say
which protocol of the client's it speaks; HTTP/1.1 is what is spoken where nothing is said.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TypeVar

from OpenSSL import SSL

from protocol.websocket.tls import Buffer

# What Python's own servers offer below TLS 1.3: forward secrecy and nothing broken.
_SUITES_1_2 = b"@SECLEVEL=2:ECDH+AESGCM:ECDH+CHACHA20:ECDH+AES:DHE+AES:!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM"
# SSL_MODE_ENABLE_PARTIAL_WRITE (openssl/ssl.h), which pyOpenSSL sets: a call would end with each record of 16 KiB.
_PARTIAL_WRITE = 0x1
# What one record holds at most (RFC 8446 section 5.1), and what is taken out at once.
_RECORD = 16 * 1024
_OUT = 288 * 1024
# TLS's sessions are never resumed, so nothing is kept of them.
_OPTIONS = SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION

Done = TypeVar("Done")


class ServerContext:
    """Certificate and key in files, PEM; no second file: the key is in the first. Raises `ssl.SSLError` and OSError."""

    def __init__(self, certificate: str, key: str | None) -> None:
        self._context = SSL.Context(SSL.TLS_SERVER_METHOD)
        self._context.set_min_proto_version(SSL.TLS1_2_VERSION)
        self._context.set_options(_OPTIONS)
        self._context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        self._context.clear_mode(_PARTIAL_WRITE)
        _translated(lambda: self._context.set_cipher_list(_SUITES_1_2))
        _translated(lambda: self._context.use_certificate_chain_file(certificate))
        _translated(lambda: self._context.use_privatekey_file(key or certificate))
        _translated(self._context.check_privatekey)

    def connection(self) -> ServerTls:
        """For one caller."""
        connection = SSL.Connection(self._context, None)
        connection.set_accept_state()
        return ServerTls(connection)


class ServerTls:
    """See `protocol.websocket.tls.Tls`."""

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection
        self._ended = False

    def shake_hands(self) -> None:
        _translated(self._connection.do_handshake)

    def read_into(self, view: memoryview) -> int:
        size, most = 0, 0 if self._ended else len(view)
        receive = self._connection.recv_into
        try:
            # Here and not outside: there are 65,536 records in a GiB.
            while size < most:
                size += receive(view[size : size + _RECORD])
        except SSL.WantReadError:
            if not size:
                raise ssl.SSLWantReadError from None
        except (SSL.ZeroReturnError, SSL.SysCallError):
            # Told by itself, the next time; the library says it once.
            self._ended = True
        except SSL.Error as error:
            raise _broken(error) from error
        return size

    def write(self, data: Buffer) -> None:
        if data:
            _translated(lambda: self._connection.send(data))

    def take_in(self, data: Buffer) -> None:
        if data:
            self._connection.bio_write(data)
        else:
            self._connection.bio_shutdown()

    def take_out(self) -> bytes:
        out = self._take_some()
        if len(out) < _OUT:
            return out
        parts = [out]
        while out := self._take_some():
            parts.append(out)
        return b"".join(parts)

    def _take_some(self) -> bytes:
        try:
            return self._connection.bio_read(_OUT)
        except SSL.WantReadError:
            return b""


def _translated(step: Callable[[], Done]) -> Done:
    """Errors of pyOpenSSL as those of Python's `ssl`."""
    try:
        return step()
    except SSL.WantReadError:
        raise ssl.SSLWantReadError from None
    except (SSL.ZeroReturnError, SSL.SysCallError):
        raise ssl.SSLEOFError from None
    except SSL.Error as error:
        raise _broken(error) from error


def _broken(error: SSL.Error) -> ssl.SSLError:
    return ssl.SSLError(ssl.SSL_ERROR_SSL, f"TLS: {error}")

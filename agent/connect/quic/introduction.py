"""The first exchange on a QUIC connection: both ends prove that they are the nodes of this session. Sans I/O.

The server's certificate is compared with its pin before the client says anything. Then, on stream 0, four lines of
JSON: the client's hello, the server's nonce and instance (another one after each start of its agent; none is said by
servers of before), the client's signature over both fingerprints, the session and both nonces, the server's word that
it is accepted. Until then neither takes anything on any other stream.
"""

from __future__ import annotations

import base64
import binascii
import secrets

import msgspec
from cryptography.exceptions import InvalidSignature

from protocol.errors import AccessDenied, ProtocolError
from protocol.identity import (
    NodeKey,
    fingerprint_of_certificate_untrusted,
    fingerprint_of_der_untrusted,
    public_key_of_certificate_untrusted,
)

MAX_INTRODUCTION = 4096
MAX_INSTANCE = 64
_CONTEXT = b"towpath-quic-1\0"


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    session: str = ""
    nonce: str = ""
    instance: str = ""
    signature: str = ""
    accepted: bool = False


def _signed(session: str, client: str, server: str, client_nonce: str, server_nonce: str) -> bytes:
    return _CONTEXT + b"\0".join(part.encode() for part in (session, client, server, client_nonce, server_nonce))


def _encode(line: _Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"


class _Lines:
    def __init__(self) -> None:
        self._data = bytearray()
        self._total = 0

    def feed_untrusted(self, data: bytes) -> list[_Line]:
        self._data += data
        self._total += len(data)
        if self._total > MAX_INTRODUCTION:
            raise ProtocolError("The introduction over QUIC is too long.")
        *lines, rest = bytes(self._data).split(b"\n")
        self._data = bytearray(rest)
        try:
            return [msgspec.json.decode(line, type=_Line) for line in lines]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError("The introduction over QUIC cannot be read.") from error


class ClientIntroduction:
    """The destination's side. ``peer_certificate`` (PEM) is the source's."""

    def __init__(self, session: str, identity: NodeKey, peer_certificate: str) -> None:
        self._session = session
        self._identity = identity
        self._server = fingerprint_of_certificate_untrusted(peer_certificate)
        self._nonce = secrets.token_urlsafe(32)
        self._lines = _Lines()
        self._signed = False
        # What the server's agent says of itself, empty if nothing.
        self.instance = ""
        self.done = False

    def up_untrusted(self, certificate_der: bytes) -> bytes:
        """The handshake is done: check who answered, and the first line to send. Raises `AccessDenied`."""
        self._check_untrusted(certificate_der)
        return _encode(_Line(session=self._session, nonce=self._nonce))

    def _check_untrusted(self, certificate_der: bytes) -> None:
        try:
            presented = fingerprint_of_der_untrusted(certificate_der)
        except ProtocolError as error:
            raise AccessDenied("The peer showed no certificate over QUIC.", code="PEER_REFUSED") from error
        if presented != self._server:
            raise AccessDenied("The peer over QUIC is not the node that the ticket names.", code="PEER_REFUSED")

    def feed_untrusted(self, data: bytes) -> bytes:
        """Bytes of stream 0; what to answer. Raises `ProtocolError`."""
        answer = b""
        for line in self._lines.feed_untrusted(data):
            if not self._signed and 16 <= len(line.nonce) <= 128:
                message = _signed(self._session, self._identity.fingerprint, self._server, self._nonce, line.nonce)
                self._signed = True
                self.instance = line.instance[:MAX_INSTANCE]
                answer += _encode(_Line(signature=base64.b64encode(self._identity.sign(message)).decode()))
            elif self._signed and line.accepted and not self.done:
                self.done = True
            else:
                raise ProtocolError("The introduction over QUIC is out of order.")
        return answer


class ServerIntroduction:
    """The source's side. ``peer_certificate`` (PEM) is the destination's, ``instance`` what tells this start of the
    agent from others."""

    def __init__(self, session: str, identity: NodeKey, peer_certificate: str, instance: str = "") -> None:
        self._session = session
        self._identity = identity
        self._peer_certificate = peer_certificate
        self._client = fingerprint_of_certificate_untrusted(peer_certificate)
        self._client_nonce = ""
        self._nonce = secrets.token_urlsafe(32)
        self._instance = instance
        self._lines = _Lines()
        self.done = False

    def feed_untrusted(self, data: bytes) -> bytes:
        """Bytes of stream 0; what to answer. Raises `ProtocolError`, `AccessDenied` for a stranger."""
        answer = b""
        for line in self._lines.feed_untrusted(data):
            if not self._client_nonce and 16 <= len(line.nonce) <= 128:
                if line.session != self._session:
                    raise AccessDenied("The peer over QUIC asks for another session.", code="PEER_REFUSED")
                self._client_nonce = line.nonce
                answer += _encode(_Line(nonce=self._nonce, instance=self._instance))
            elif self._client_nonce and line.signature and not self.done:
                self._verify(line.signature)
                self.done = True
                answer += _encode(_Line(accepted=True))
            else:
                raise ProtocolError("The introduction over QUIC is out of order.")
        return answer

    def _verify(self, signature: str) -> None:
        message = _signed(self._session, self._client, self._identity.fingerprint, self._client_nonce, self._nonce)
        try:
            raw = base64.b64decode(signature, validate=True)
            public_key_of_certificate_untrusted(self._peer_certificate).verify(raw, message)
        except (binascii.Error, ValueError, InvalidSignature) as error:
            raise AccessDenied(
                "The peer over QUIC is not the node that the ticket names.", code="PEER_REFUSED"
            ) from error


class ClientLook(ClientIntroduction):
    """The destination's side where it only wants to know whether QUIC works: a handshake with the right node."""

    def up_untrusted(self, certificate_der: bytes) -> bytes:
        """The handshake is done: check who answered; nothing is to be sent. Raises `AccessDenied`."""
        self._check_untrusted(certificate_der)
        self.done = True
        return b""

    def feed_untrusted(self, data: bytes) -> bytes:
        """Raises `ProtocolError`: nothing may be said."""
        raise ProtocolError("The peer says something over QUIC where only the way was looked at.")


class ServerLook:
    """The source's side of it: whoever it is, nothing is served and nothing taken."""

    done = False

    def feed_untrusted(self, data: bytes) -> bytes:
        """Raises `ProtocolError`: nothing may be said."""
        raise ProtocolError("The peer says something over QUIC where only the way was looked at.")

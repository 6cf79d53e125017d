"""TLS for sessions: both sides present their node's certificate and accept exactly one peer.

Each session has contexts of its own that trust one certificate (partial chain, no other roots) and demand one, so a
stranger is refused inside the handshake; `check_peer` then compares the pin with the ticket's once more. Verify
mode does not travel with a context that is switched in by SNI, which is why no context is ever switched here.
"""

from __future__ import annotations

import os
import ssl
import sys
import tempfile

from protocol.errors import AccessDenied, ProtocolError
from protocol.identity import NodeKey, fingerprint_of_certificate_untrusted, fingerprint_of_der_untrusted

HANDSHAKE_TIMEOUT = 20.0
# SSL_OP_PRIORITIZE_CHACHA (openssl/ssl.h), which `ssl` has no name for: a client that asks for it first gets it.
_PRIORITIZE_CHACHA = 1 << 21


def session_context(
    identity: NodeKey, peer_certificate: str, *, server_side: bool, alpn: tuple[str, ...]
) -> ssl.SSLContext:
    """A context for connections of one session: TLS 1.3, our node certificate, one pinned peer.

    Raises `ProtocolError` when the peer's certificate cannot be read.
    """
    fingerprint_of_certificate_untrusted(peer_certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_TRUSTED_FIRST
    context.load_verify_locations(cadata=peer_certificate)
    context.set_alpn_protocols(list(alpn))
    # Tickets of TLS would let a later connection skip the certificate; sessions are few, handshakes are cheap.
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    if server_side:
        context.num_tickets = 0
        # A destination asks for ChaCha20 first, whose keys never protect too much (`agent.connect.control_tls`).
        context.options |= _PRIORITIZE_CHACHA
    _load_identity(context, identity)
    return context


def _load_identity(context: ssl.SSLContext, identity: NodeKey) -> None:
    # `ssl` loads keys from files only; an anonymous file keeps the key off every disk.
    if sys.platform == "linux":
        descriptor = os.memfd_create("towpath", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(identity.private_key_pem + identity.certificate_pem.encode())
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    else:
        with tempfile.NamedTemporaryFile(prefix="towpath-", suffix=".pem") as file:
            file.write(identity.private_key_pem + identity.certificate_pem.encode())
            file.flush()
            context.load_cert_chain(file.name)


def check_peer(certificate_der: bytes | None, fingerprint: str) -> None:
    """Compare the certificate of a finished handshake with the pin of the ticket. Raises `AccessDenied`."""
    try:
        presented = fingerprint_of_der_untrusted(certificate_der or b"")
    except ProtocolError as error:
        raise AccessDenied("The peer presented no certificate that can be read.", code="PEER_REFUSED") from error
    if presented != fingerprint:
        raise AccessDenied("The peer is not the node that the ticket names.", code="PEER_REFUSED")

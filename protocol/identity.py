"""Node identity: one Ed25519 key per agent installation, and the certificate it travels in.

The certificate is self-signed and only a container: nobody checks its names or dates, both sides pin the
SHA-256 of its SubjectPublicKeyInfo (RFC 7469's pin), which tickets carry.
"""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from protocol.errors import ProtocolError
from protocol.private_file import write_private_file

MAX_CERTIFICATE = 16 * 1024


def public_key_fingerprint(key: Ed25519PublicKey) -> str:
    """Lower-case hex SHA-256 of the key's SubjectPublicKeyInfo."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _certificate_for(key: Ed25519PrivateKey) -> str:
    # A fixed name and a fixed life: the certificate says nothing that could identify its owner, and the
    # pin, not the calendar, decides whether it counts.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "towpath node")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(int.from_bytes(bytes.fromhex(public_key_fingerprint(key.public_key()))[:16], "big") or 1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=365 * 100))
        .sign(key, None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


class NodeKey:
    """A node's private key. It never leaves the machine; `save` writes it with mode 0600."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self.private_key = private_key
        self.certificate_pem = _certificate_for(private_key)
        self.fingerprint = public_key_fingerprint(private_key.public_key())

    @classmethod
    def generate(cls) -> NodeKey:
        """A new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Read a key written by `save`. Raises OSError, or ValueError when the file is not an Ed25519 key."""
        return cls(load_private_key(path))

    @classmethod
    def from_pem(cls, pem: bytes) -> NodeKey:
        """A key from `private_key_pem`. Raises ValueError when it is no Ed25519 key."""
        return cls(private_key_from_pem(pem))

    def save(self, path: Path) -> None:
        """Write the key, durable and atomic, readable by its owner alone."""
        write_private_file(path, self.private_key_pem)

    @property
    def private_key_pem(self) -> bytes:
        """The private key, as PEM; never to be logged."""
        return private_key_pem(self.private_key)

    def sign(self, data: bytes) -> bytes:
        """An Ed25519 signature (RFC 8032) of 64 bytes."""
        return self.private_key.sign(data)


def private_key_pem(key: Ed25519PrivateKey) -> bytes:
    """PKCS 8 PEM, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 key in PKCS 8 PEM. Raises OSError or ValueError."""
    try:
        return private_key_from_pem(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} holds no Ed25519 key.") from error


def private_key_from_pem(pem: bytes) -> Ed25519PrivateKey:
    """The Ed25519 key in a PKCS 8 PEM. Raises ValueError when there is none."""
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("This is no Ed25519 key.")
    return key


def public_key_of_certificate_untrusted(pem: str) -> Ed25519PublicKey:
    """The Ed25519 key inside a peer's certificate. Raises only `ProtocolError`."""
    if len(pem) > MAX_CERTIFICATE:
        raise ProtocolError("The certificate of the peer is too large.")
    try:
        key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    except (ValueError, TypeError, UnicodeEncodeError, x509.InvalidVersion) as error:
        raise ProtocolError("The certificate of the peer cannot be read.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProtocolError("The certificate of the peer holds no Ed25519 key.")
    return key


def certificates_agree_untrusted(shown: str, enrolled: str) -> bool:
    """Whether two certificates (PEM) hold the same key. Raises only `ProtocolError`."""
    # The same text needs no reading, and nearly always it is the same.
    return shown == enrolled or fingerprint_of_certificate_untrusted(shown) == fingerprint_of_certificate_untrusted(
        enrolled
    )


def fingerprint_of_certificate_untrusted(pem: str) -> str:
    """The pin of a peer's certificate. Raises only `ProtocolError`."""
    return public_key_fingerprint(public_key_of_certificate_untrusted(pem))


def fingerprint_of_der_untrusted(der: bytes) -> str:
    """The pin of a certificate as `ssl` returns it after a handshake. Raises only `ProtocolError`."""
    if len(der) > MAX_CERTIFICATE:
        raise ProtocolError("The certificate of the peer is too large.")
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise ProtocolError("The certificate of the peer cannot be read.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProtocolError("The certificate of the peer holds no Ed25519 key.")
    return public_key_fingerprint(key)

"""The certificate of the relay's port: made and renewed here, or the operator's own, taken up again when it changes.

A self-made certificate comes from a CA made for this relay alone. Agents pin that CA through their setup key; users
give it to their Globus clients (`GLOBUS_SDK_VERIFY_SSL`).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.errors import NeedsPerson
from protocol.private_file import write_private_file
from relay.settings import Settings

_CA_LIFE = datetime.timedelta(days=3650)
# Some platforms refuse server certificates that live longer than 398 days.
_LEAF_LIFE = datetime.timedelta(days=397)
_RENEW_BEFORE = datetime.timedelta(days=60)
_BACKDATE = datetime.timedelta(days=1)
# Days before its end from which on log and doctor warn of the certificate: the relay's own is renewed long before.
CERTIFICATE_WARNING = 14.0


class CertificateUnusable(NeedsPerson):
    """The certificate or its key cannot be read or do not belong together."""

    default_code = "CERTIFICATE"


@dataclass(frozen=True)
class CertificateStatistics:
    """Which certificate the port shows. Ends are Unix seconds; the authority is the relay's own, None beside a
    certificate of the operator's."""

    names: tuple[str, ...]
    expires: float
    self_made: bool
    authority_expires: float | None = None


class ServerCertificate:
    """The certificate in use. ``context`` and, for agents' links, ``link_context`` are made anew with each one;
    ``channel`` is the hex SHA-256 of its DER form."""

    def __init__(self, settings: Settings) -> None:
        """Load (and renew if due) the certificate. Raises `CertificateUnusable`."""
        self._settings = settings
        self.channel = ""
        self._leaf: x509.Certificate | None = None
        self._authority: x509.Certificate | None = None
        self.renew(datetime.datetime.now(datetime.UTC))

    def renew(self, now: datetime.datetime) -> bool:
        """Renew a self-made certificate that nears its end or lacks a name; take up one that changed on disk.

        Returns whether the port shows another certificate from now on. Raises `CertificateUnusable`.
        """
        if self._settings.tls.certificate is None:
            self._authority = create(self._settings, now)
        chain, key = certificate_paths(self._settings)
        leaf = read_certificate(chain)
        if self._leaf is not None and leaf == self._leaf:
            return False
        try:
            # New ones: one that has been given a certificate of another kind of key goes on to show the former.
            contexts = _context(ssl.TLSVersion.TLSv1_2), _context(ssl.TLSVersion.TLSv1_3)
            for context in contexts:
                context.load_cert_chain(chain, key)
        except (OSError, ssl.SSLError) as error:
            raise CertificateUnusable(f"{chain} and its key cannot be used: {error}", who="relay operator") from error
        self.context, self.link_context = contexts
        # A link lasts, and after a restart nobody could read the tickets.
        self.link_context.num_tickets = 0
        self._leaf = leaf
        self.channel = hashlib.sha256(leaf.public_bytes(serialization.Encoding.DER)).hexdigest()
        return True

    @property
    def files(self) -> tuple[str, str | None]:
        """Where certificate and key are, for another process of the relay; no second file: the key is in the first."""
        chain, key = certificate_paths(self._settings)
        return str(chain), None if key is None else str(key)

    def statistics(self) -> CertificateStatistics:
        """Names and end of the certificate in use, and when its authority ended as it was last looked at."""
        assert self._leaf is not None
        return CertificateStatistics(
            names=tuple(sorted(names_of(self._leaf))),
            expires=self._leaf.not_valid_after_utc.timestamp(),
            self_made=self._settings.tls.certificate is None,
            authority_expires=None if self._authority is None else self._authority.not_valid_after_utc.timestamp(),
        )


def _context(least: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = least
    return context


def tls_directory(settings: Settings) -> Path:
    """Where self-made certificates are."""
    return settings.directory_path / "tls"


def authority_of(settings: Settings) -> x509.Certificate:
    """The CA's certificate. Raises `CertificateUnusable`."""
    return read_certificate(tls_directory(settings) / "ca.pem")


def ca_certificate_pem(settings: Settings) -> str | None:
    """The CA that clients must trust, or None beside a certificate of the operator's. Raises `CertificateUnusable`."""
    if settings.tls.certificate is not None:
        return None
    path = tls_directory(settings) / "ca.pem"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CertificateUnusable(f"{path}: {error.strerror}; run `towpath-relay init`.") from error


def ca_fingerprint(settings: Settings) -> str | None:
    """Hex SHA-256 of the CA certificate's DER form, as setup keys carry it, or None."""
    pem = ca_certificate_pem(settings)
    return None if pem is None else hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def create(settings: Settings, now: datetime.datetime) -> x509.Certificate:
    """Make the CA if it is missing, and the server certificate if it is missing, near its end, or lacks a name.

    Returns the CA's certificate. Raises `CertificateUnusable` and OSError.
    """
    directory = tls_directory(settings)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    # The key file is written first and `ca.pem` is made from it, so an interrupted start goes on where it was.
    if not (directory / "ca.pem").exists():
        if not (directory / "ca.key").exists():
            write_private_file(directory / "ca.key", _pem(ec.generate_private_key(ec.SECP256R1())))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{settings.name[:48]} CA")])
        _write_authority(directory, _make_authority(_read_key(directory / "ca.key"), subject, now))
    authority = authority_of(settings)
    path = directory / "server.pem"
    if path.exists():
        leaf = read_certificate(path)
        # None lasts longer than the authority: making it again would gain nothing.
        lasts = min(now + _RENEW_BEFORE, authority.not_valid_after_utc) <= leaf.not_valid_after_utc
        if lasts and names_of(leaf) >= set(settings.certificate_names):
            return authority
    authority_key = _authority_key(directory, authority)
    if authority.not_valid_after_utc <= now:
        raise CertificateUnusable(
            f"The relay's own authority {directory / 'ca.pem'} has ended; run `towpath-relay authority renew`.",
            who="relay operator",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = _make_leaf(key, settings.certificate_names, authority, authority_key, now)
    # Key and certificate in one file: they are replaced together or not at all.
    write_private_file(path, leaf.public_bytes(serialization.Encoding.PEM) + _pem(key))
    return authority


def renew_authority(settings: Settings, now: datetime.datetime) -> datetime.datetime:
    """Give the CA ten more years: the same key under the same name, in a certificate that ends later. Returns that end.

    Who trusts the former certificate accepts what the key signs until that one ends (RFC 5280, section 6.1.1: of a
    trust anchor, name and key count); so every copy of it is to be replaced until then, and none is cut off before.
    Raises `CertificateUnusable` and OSError.
    """
    if settings.tls.certificate is not None:
        raise CertificateUnusable(
            "This relay shows a certificate of yours (`tls.certificate`); its authority is not the relay's to renew.",
            who="you",
        )
    directory = tls_directory(settings)
    former = authority_of(settings)
    renewed = _make_authority(_authority_key(directory, former), former.subject, now)
    _write_authority(directory, renewed)
    return renewed.not_valid_after_utc


def _write_authority(directory: Path, authority: x509.Certificate) -> None:
    write_private_file(directory / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    (directory / "ca.pem").chmod(0o644)


def _authority_key(directory: Path, authority: x509.Certificate) -> ec.EllipticCurvePrivateKey:
    key = _read_key(directory / "ca.key")
    if key.public_key() != authority.public_key():
        # What another key signs, none of those who trust this CA would accept.
        raise CertificateUnusable(
            f"{directory / 'ca.key'} is not the key of {directory / 'ca.pem'}; restore both from one backup.",
            who="relay operator",
        )
    return key


def certificate_paths(settings: Settings) -> tuple[Path, Path | None]:
    """Where certificate and key are; no second file: the key is in the first."""
    if settings.tls.certificate is None or settings.tls.key is None:
        return tls_directory(settings) / "server.pem", None
    return settings.directory_path / settings.tls.certificate, settings.directory_path / settings.tls.key


def _make_authority(key: ec.EllipticCurvePrivateKey, subject: x509.Name, now: datetime.datetime) -> x509.Certificate:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _make_leaf(
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
) -> x509.Certificate:
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(min(now + _LEAF_LIFE, authority.not_valid_after_utc))
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def names_of(certificate: x509.Certificate) -> set[str]:
    """The host names and addresses a certificate is good for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    return addresses | set(names.get_values_for_type(x509.DNSName))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file. Raises `CertificateUnusable`."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise CertificateUnusable(f"{path}: {error.strerror}.", who="relay operator") from error
    except ValueError as error:
        raise CertificateUnusable(f"{path} holds no certificate.", who="relay operator") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise CertificateUnusable(f"{path}: {error.strerror}.", who="relay operator") from error
    except ValueError as error:
        raise CertificateUnusable(f"{path} holds no key.", who="relay operator") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateUnusable(f"{path} holds a key of another kind.", who="relay operator")
    return key

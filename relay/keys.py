"""The relay's own keys: its name, the root, the ticket key the root certifies, and the key that signs id_tokens.

All lie in one directory, each file 0600 and replaced whole. The root may be taken away (see `towpath-relay root`); then
ticket keys no longer renew by themselves and the operator certifies new ones where the root is kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import NeedsPerson
from protocol.identity import private_key_from_pem, private_key_pem, public_key_fingerprint
from protocol.private_file import write_private_file
from protocol.ticket import LEEWAY, RelayRoot, TicketSigner

ID_TOKEN_ALGORITHM = "RS512"  # noqa: S105 - the name of an algorithm
ID_TOKEN_KEY, FORMER_ID_TOKEN_KEY = "id-token.pem", "id-token-former.pem"
_RSA_BITS = 3072
# Agents with clocks behind ours must already accept a ticket key that was certified a moment ago.
_BACKDATE = 3600.0


class KeysUnusable(NeedsPerson):
    """A key file is missing, damaged or out of date; the sentence says which and what to do."""

    default_code = "KEYS"


@dataclass(frozen=True)
class KeyStatistics:
    """The state of the ticket key. Times are Unix seconds."""

    relay_id: str
    ticket_key: str
    ticket_key_expires: float
    root_present: bool


class _TicketKeyFile(msgspec.Struct, frozen=True):
    """Key and certificate in one file, so that they can never be of different ages."""

    kid: str
    key: str
    certificate: str
    expires: float


class RotatingSigner(TicketSigner):
    """A `TicketSigner` whose key is replaced while others hold it."""

    def adopt(self, key: Ed25519PrivateKey, certificate: str, kid: str) -> None:
        """Sign with this key from now on. What the former key signed stays valid until its certificate ends."""
        super().__init__(self.relay_id, key, certificate, kid)


class RelayKeys:
    """All keys of a running relay. ``signer`` always holds the newest ticket key."""

    def __init__(self, directory: Path) -> None:
        """Read the keys made by `create`. Raises `KeysUnusable`."""
        self._directory = directory
        self.relay_id = _read(directory / "relay-id").decode().strip()
        self.root_public_pem = _read(directory / "root-public.pem").decode()
        self._load_id_token_keys()
        self._ticket = _load_ticket_key(directory)
        key = _private(self._ticket, directory)
        self.signer = RotatingSigner(self.relay_id, key, self._ticket.certificate, self._ticket.kid)

    def _load_id_token_keys(self) -> None:
        self._rsa = _load_rsa(self._directory / ID_TOKEN_KEY)
        keys = [_jwk(self._rsa.public_key())]
        if (self._directory / FORMER_ID_TOKEN_KEY).exists():
            keys.append(_jwk(_load_rsa(self._directory / FORMER_ID_TOKEN_KEY).public_key()))
        # Clients take the first one for the one in use.
        unique = {key["kid"]: key for key in keys}
        self.jwk_set: dict[str, Any] = {"keys": list(unique.values())}

    def renew_id_token_key(self, now: float, *, life: float) -> bool:
        """Replace the key of id_tokens when it is older than ``life`` seconds; the former one stays published.

        Returns whether it was replaced. Raises `KeysUnusable` and OSError.
        """
        current = self._directory / ID_TOKEN_KEY
        if now - current.stat().st_mtime < life:
            return False
        # In this order a kill between the two leaves one key under both names, which is harmless.
        write_private_file(self._directory / FORMER_ID_TOKEN_KEY, _read(current))
        write_private_file(current, _new_rsa_pem())
        os.utime(current, (now, now))
        self._load_id_token_keys()
        return True

    @property
    def root_path(self) -> Path:
        """Where the private key of the root is kept."""
        return self._directory / "root.pem"

    def renew(self, now: float, *, key_life: float, ticket_life: float) -> bool:
        """Replace the ticket key when it nears its end, or has not begun; also take up one that another process has put
        in place.

        Returns whether the key changed. Raises `KeysUnusable` when a new one is due but the root is not here.
        """
        stored = _load_ticket_key(self._directory)
        changed = stored.kid != self._ticket.kid
        left = stored.expires - now
        # Made in what is the future now: the clock has gone back, and agents would refuse what this key signs.
        too_new = left > key_life + _BACKDATE and self.root_path.exists()
        # A ticket outlives its renewal by at most its own life; the key's certificate must outlive the ticket.
        if too_new or left < max(key_life / 3, ticket_life + LEEWAY):
            if not self.root_path.exists():
                if changed:
                    self._adopt(stored)
                raise KeysUnusable(
                    "The ticket key nears its end and the root key is not on this machine; "
                    "run `towpath-relay root certify --root FILE` with the root key.",
                    who="relay operator",
                )
            stored = certify_ticket_key(self._directory, RelayRoot.load(self.root_path), now, key_life)
            changed = True
        if changed:
            self._adopt(stored)
        return changed

    def _adopt(self, ticket: _TicketKeyFile) -> None:
        self.signer.adopt(_private(ticket, self._directory), ticket.certificate, ticket.kid)
        self._ticket = ticket

    def id_token(self, claims: Mapping[str, Any]) -> str:
        """Sign an OpenID Connect id_token."""
        kid = self.jwk_set["keys"][0]["kid"]
        return jwt.encode(dict(claims), self._rsa, algorithm=ID_TOKEN_ALGORITHM, headers={"kid": kid})

    def statistics(self) -> KeyStatistics:
        """Which ticket key is in use and until when."""
        return KeyStatistics(self.relay_id, self._ticket.kid, self._ticket.expires, self.root_path.exists())


def create(directory: Path, now: float, key_life: float) -> None:
    """Make every key that is missing; what is there stays. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (directory / "relay-id").exists():
        write_private_file(directory / "relay-id", str(uuid.uuid4()).encode() + b"\n")
    if not (directory / "root-public.pem").exists():
        if not (directory / "root.pem").exists():
            RelayRoot.generate().save(directory / "root.pem")
        write_private_file(directory / "root-public.pem", RelayRoot.load(directory / "root.pem").public_pem.encode())
    if not (directory / ID_TOKEN_KEY).exists():
        write_private_file(directory / ID_TOKEN_KEY, _new_rsa_pem())
    if not (directory / "ticket-key.json").exists():
        certify_ticket_key(directory, RelayRoot.load(directory / "root.pem"), now, key_life)


def _new_rsa_pem() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certify_ticket_key(directory: Path, root: RelayRoot, now: float, key_life: float) -> _TicketKeyFile:
    """Make a new ticket key, have the root certify it for ``key_life`` seconds, and put it in place of the old one.

    Raises `KeysUnusable` when this is not the root that the agents have pinned.
    """
    if root.public_pem != _read(directory / "root-public.pem").decode():
        raise KeysUnusable("This is not the root key of this relay; its agents trust another one.")
    key = Ed25519PrivateKey.generate()
    kid = public_key_fingerprint(key.public_key())[:16]
    certificate = root.certify(key.public_key(), kid, now - _BACKDATE, now + key_life)
    ticket = _TicketKeyFile(kid, private_key_pem(key).decode(), certificate, now + key_life)
    write_private_file(directory / "ticket-key.json", msgspec.json.encode(ticket))
    return ticket


def move_root(directory: Path, target: Path) -> None:
    """Move the root's private half to ``target``; it is gone here only once it is safe there.

    Raises `KeysUnusable` when it is not here or ``target`` exists, and OSError.
    """
    root = directory / "root.pem"
    if not root.exists() and (directory / "root-public.pem").exists():
        raise KeysUnusable("The root key is not on this machine any more; it was moved before.", who="relay operator")
    data = _read(root)
    if target.exists():
        raise KeysUnusable(f"{target} exists already; choose another name.", who="you")
    write_private_file(target, data)
    root.unlink()


def _load_ticket_key(directory: Path) -> _TicketKeyFile:
    path = directory / "ticket-key.json"
    try:
        return msgspec.json.decode(_read(path), type=_TicketKeyFile)
    except msgspec.DecodeError as error:
        raise _damaged(path) from error


def _private(ticket: _TicketKeyFile, directory: Path) -> Ed25519PrivateKey:
    try:
        return private_key_from_pem(ticket.key.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # A TypeError where it is encrypted.
        raise _damaged(directory / "ticket-key.json") from error


def _damaged(ticket_key: Path) -> KeysUnusable:
    return KeysUnusable(
        f"{ticket_key} is damaged; run `towpath-relay root certify`, which makes a new one (`--root FILE` where the "
        "root key is kept elsewhere), or restore it from a backup.",
        who="relay operator",
    )


def _load_rsa(path: Path) -> rsa.RSAPrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except ValueError as error:
        raise KeysUnusable(f"{path} is damaged; restore it from a backup.", who="relay operator") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise KeysUnusable(f"{path} holds no RSA key.", who="relay operator")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeysUnusable(
            f"{path}: {error.strerror}; run `towpath-relay init` or restore a backup.", who="relay operator"
        ) from error


def _jwk(key: rsa.RSAPublicKey) -> dict[str, str]:
    numbers = key.public_numbers()
    public = {"e": _base64_number(numbers.e), "kty": "RSA", "n": _base64_number(numbers.n)}
    # RFC 7638: the key's name is the digest of its required members in this order and form.
    canonical = json.dumps(public, separators=(",", ":"), sort_keys=True).encode()
    kid = base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()
    return {**public, "kid": kid, "alg": ID_TOKEN_ALGORITHM, "use": "sig"}


def _base64_number(number: int) -> str:
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

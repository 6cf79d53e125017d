"""Tickets: what the relay lets two nodes do with each other, signed so that the nodes can check it alone.

A ticket is a JWT (RFC 7519) signed with EdDSA by the relay's short-lived ticket key; the key's own certificate,
a JWT signed by the relay's root key, travels in the ticket's header (`kc`), so agents that pinned the root at
enrolment follow key rotations without asking anybody.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import jwt
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.control import Record
from protocol.errors import ProtocolError
from protocol.identity import load_private_key, private_key_pem, public_key_fingerprint
from protocol.names import CollectionPath, parse_path_untrusted
from protocol.private_file import write_private_file

ALGORITHM = "EdDSA"
MAX_TOKEN = 256 * 1024
MAX_PATHS = 1000
# Clocks of laptops differ; a ticket is accepted this many seconds before its first and after its last moment.
LEEWAY = 120.0
# The code of everything that fails because a ticket has run out.
TICKET_EXPIRED = "TICKET_EXPIRED"


class Grant(Record, frozen=True, kw_only=True):
    """What one side of a ticket may be asked for: a node (by certificate pin), a collection, path prefixes.

    ``reach`` names the folders in which symlinks below those paths may end: what the task's owner may read (or write)
    at all. None is the whole collection; a ticket that says nothing reaches no farther than its paths.
    """

    node_id: str
    fingerprint: str
    collection_id: str
    paths: list[str]
    access: Literal["r", "rw"]
    reach: list[str] | None = None

    def folders(self) -> tuple[CollectionPath, ...] | None:
        """``reach`` as parsed paths. Raises `ProtocolError`."""
        return None if self.reach is None else tuple(parse_path_untrusted(path) for path in self.reach)


def owner_digest(task_id: str, owner_id: str) -> str:
    """Names the owner of a task to whoever knows both ids already, and to nobody else."""
    return hashlib.sha256(f"{task_id}/{owner_id}".encode()).hexdigest()


class Ticket(Record, frozen=True, kw_only=True):
    """One permission: this task, these nodes, these collections and paths, until ``expires`` (Unix seconds).

    ``owner_digest`` (empty in tickets of older relays) lets a relay that was restored from an older backup know again
    whose task this is.
    """

    relay_id: str
    ticket_id: str
    session_id: str
    task_id: str
    source: Grant | None
    destination: Grant
    policy_epoch: int
    issued: float
    expires: float
    owner_digest: str = ""


def _public_pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def _load_public(pem: str) -> Ed25519PublicKey:
    key = serialization.load_pem_public_key(pem.encode())
    if not isinstance(key, Ed25519PublicKey):
        raise TypeError("not an Ed25519 key")
    return key


class RelayRoot:
    """The relay's root key. It certifies ticket keys and may be kept off the relay's machine between rotations."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self.private_key = private_key
        self.public_pem = _public_pem(private_key.public_key())

    @classmethod
    def generate(cls) -> RelayRoot:
        """A new random root."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> RelayRoot:
        """Read a root written by `save`. Raises OSError or ValueError."""
        return cls(load_private_key(path))

    def save(self, path: Path) -> None:
        """Write the root key, durable and atomic, readable by its owner alone."""
        write_private_file(path, private_key_pem(self.private_key))

    def certify(self, public_key: Ed25519PublicKey, kid: str, not_before: float, expires: float) -> str:
        """A key certificate: a JWT that says which ticket key speaks for this relay, and how long."""
        claims = {"kid": kid, "key": _public_pem(public_key), "nbf": int(not_before), "exp": int(expires)}
        return jwt.encode(claims, self.private_key, algorithm=ALGORITHM)


class TicketSigner:
    """Signs with one certified ticket key."""

    def __init__(self, relay_id: str, key: Ed25519PrivateKey, key_certificate: str, kid: str) -> None:
        self.relay_id = relay_id
        self.key_certificate = key_certificate
        self.kid = kid
        self._key = key

    @property
    def fingerprint(self) -> str:
        """Of its public key."""
        return public_key_fingerprint(self._key.public_key())

    def sign_claims(self, claims: dict[str, Any]) -> str:
        """Sign arbitrary claims (the relay's hello proof)."""
        headers = {"kid": self.kid, "kc": self.key_certificate}
        return jwt.encode(claims, self._key, algorithm=ALGORITHM, headers=headers)

    def sign(self, ticket: Ticket) -> str:
        """The ticket as it travels. Raises ValueError for more than `MAX_PATHS` paths a side."""
        for grant in (ticket.destination, ticket.source):
            if grant is not None and max(len(grant.paths), len(grant.reach or ())) > MAX_PATHS:
                raise ValueError(f"A ticket names at most {MAX_PATHS} path prefixes a side.")
        return self.sign_claims(
            {
                "iss": ticket.relay_id,
                "jti": ticket.ticket_id,
                "sid": ticket.session_id,
                "task": ticket.task_id,
                "src": None if ticket.source is None else _grant_claims(ticket.source),
                "dst": _grant_claims(ticket.destination),
                "policy": ticket.policy_epoch,
                "own": ticket.owner_digest,
                "iat": int(ticket.issued),
                "exp": int(ticket.expires),
            }
        )


def _grant_claims(grant: Grant) -> dict[str, Any]:
    return {
        "node": grant.node_id,
        "fingerprint": grant.fingerprint,
        "collection": grant.collection_id,
        "paths": grant.paths,
        "access": grant.access,
        "reach": grant.reach,
    }


class _GrantClaims(msgspec.Struct, frozen=True):
    node: str
    fingerprint: str
    collection: str
    paths: list[str]
    access: Literal["r", "rw"]
    reach: list[str] | msgspec.UnsetType | None = msgspec.UNSET

    def grant(self) -> Grant:
        reach = self.paths if self.reach is msgspec.UNSET else self.reach
        if max(len(self.paths), len(reach or ())) > MAX_PATHS:
            raise ProtocolError("The ticket names too many paths.")
        return Grant(
            node_id=self.node,
            fingerprint=self.fingerprint,
            collection_id=self.collection,
            paths=self.paths,
            access=self.access,
            reach=reach,
        )


class _TicketClaims(msgspec.Struct, frozen=True):
    iss: str
    jti: str
    sid: str
    task: str
    src: _GrantClaims | None
    dst: _GrantClaims
    policy: int
    iat: float
    exp: float
    own: str = ""


class _KeyClaims(msgspec.Struct, frozen=True):
    kid: str
    key: str
    nbf: float
    exp: float


class TicketVerifier:
    """Checks what a relay signed, against the root key pinned at enrolment."""

    def __init__(self, relay_id: str, root_public_pem: str) -> None:
        self.relay_id = relay_id
        self._root = _load_public(root_public_pem)

    def _certified_key(self, key_certificate: str, kid: str, now: float) -> Ed25519PublicKey:
        claims = msgspec.convert(_decode(key_certificate, self._root), _KeyClaims)
        if claims.kid != kid:
            raise ProtocolError("The relay signed with a key other than the one its root key certified.")
        if not claims.nbf - LEEWAY <= now <= claims.exp + LEEWAY:
            raise ProtocolError(
                "The relay's signing key is not valid at this time; check the clocks of relay and agent."
            )
        return _load_public(claims.key)

    def claims_untrusted(self, token: str, now: float, audience: str | None = None) -> dict[str, Any]:
        """The claims of any token this relay signed, signature, issuer, audience and times checked.

        Raises only `ProtocolError`.
        """
        if len(token) > MAX_TOKEN:
            raise ProtocolError("The signed statement of the relay is too large.")
        try:
            header = jwt.get_unverified_header(token)
            kid, certificate = header.get("kid"), header.get("kc")
            if not isinstance(kid, str) or not isinstance(certificate, str):
                raise ProtocolError("The statement of the relay names no certified key.")
            claims = _decode(token, self._certified_key(certificate, kid, now))
        except (jwt.PyJWTError, msgspec.ValidationError, ValueError, TypeError, RecursionError) as error:
            raise ProtocolError("A statement that should come from the relay is not signed by it.") from error
        if claims.get("iss") != self.relay_id:
            raise ProtocolError("The statement was signed by another relay.")
        if audience is not None and claims.get("aud") != audience:
            raise ProtocolError("The statement of the relay is meant for somebody else.")
        issued, expires = claims.get("iat"), claims.get("exp")
        if not isinstance(issued, int | float) or not isinstance(expires, int | float):
            raise ProtocolError("The statement of the relay has no time of validity.")
        if now > expires + LEEWAY or now < issued - LEEWAY:
            raise TicketExpired("The statement of the relay is not valid at this time.")
        return claims

    def at_any_time_untrusted(self, token: str) -> Ticket:
        """A ticket whose signature and relay are right, for what it said when it was issued, also after its end.

        For work of the destination on its own storage, which was allowed then. Raises only `ProtocolError`.
        """
        try:
            issued = jwt.decode(token, options={"verify_signature": False}).get("iat")
        except (jwt.PyJWTError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError("A statement that should come from the relay is not signed by it.") from error
        if not isinstance(issued, int | float):
            raise ProtocolError("The statement of the relay has no time of validity.")
        return self.verify_untrusted(token, issued)

    def verify_untrusted(self, token: str, now: float) -> Ticket:
        """A ticket whose signature, relay and times are right. ``now`` is Unix seconds.

        Raises only `ProtocolError` (its subclass `TicketExpired` when only the time is wrong).
        """
        claims = self.claims_untrusted(token, now)
        try:
            parsed = msgspec.convert(claims, _TicketClaims)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"The ticket is malformed: {error}") from error
        return Ticket(
            relay_id=parsed.iss,
            ticket_id=parsed.jti,
            session_id=parsed.sid,
            task_id=parsed.task,
            source=None if parsed.src is None else parsed.src.grant(),
            destination=parsed.dst.grant(),
            policy_epoch=parsed.policy,
            issued=parsed.iat,
            expires=parsed.exp,
            owner_digest=parsed.own,
        )


class TicketExpired(ProtocolError):
    """Signed by the right relay, but not valid now; a renewed ticket will do."""

    default_code = TICKET_EXPIRED


def _decode(token: str, key: Ed25519PublicKey) -> dict[str, Any]:
    # Times and audience are checked by the caller against the `now` it was given, not against the clock.
    options = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False}
    return jwt.decode(token, key, algorithms=[ALGORITHM], options=options)  # type: ignore[arg-type] # PyJWT 2.9's

"""The first exchange on a link: how relay and agent prove to each other who they are. Sans I/O.

Both proofs bind the channel, the hash of the relay's TLS certificate as either side sees it (RFC 5929,
tls-server-end-point), so somebody who terminates TLS in between is noticed even when the agent's system trusts him.
The relay proves itself first: an agent signs nothing for a stranger. See docs/protocol.md, "The link".
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature

from protocol.candidates import Candidate, check_candidates_untrusted
from protocol.control import AgentHello, CollectionReport, RelayHello, decode_untrusted
from protocol.errors import ProtocolError
from protocol.identity import NodeKey, certificates_agree_untrusted, public_key_of_certificate_untrusted
from protocol.ticket import TicketSigner, TicketVerifier

ALPN = "towpath-link/1"
HELLO_PATH = "/link/hello"
# How long the relay's proof is good for, in seconds, and the longest life an agent accepts.
PROOF_LIFE = 60
MAX_PROOF_LIFE = 600
# Seconds of silence after which a link through a proxy is asked for a sign of life; it is dead after twice as long.
WATCH, WATCH_MOST = 6.5, 32.0
MAX_HELLO = 1024 * 1024
MAX_ABILITIES = 256
MAX_COLLECTIONS = 10_000

_NONCE = re.compile(r"[A-Za-z0-9_-]{32,128}")
_CHANNEL = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class HelloFields:
    """What an agent tells about itself beyond its identity; asked for anew at every link."""

    version: str = ""
    abilities: tuple[str, ...] = ()
    collections: tuple[CollectionReport, ...] = ()
    boot_id: str = ""
    paused: bool = False
    last_event: int = 0
    tasks: int | None = None
    candidates: tuple[Candidate, ...] = ()


def watch_untrusted(wanted: float) -> float:
    """What the other side says of a link's watch, within bounds that neither flood nor forget."""
    return max(WATCH, min(wanted, WATCH_MOST)) if math.isfinite(wanted) else WATCH


def channel_of(certificate_der: bytes) -> str:
    """The channel: lower-case hex SHA-256 of the TLS server certificate."""
    return hashlib.sha256(certificate_der).hexdigest()


def new_nonce() -> str:
    """256 random bits."""
    return secrets.token_urlsafe(32)


def make_relay_hello(
    signer: TicketSigner,
    *,
    channel: str,
    nonce: str,
    now: float,
    node_id: str = "",
    version: str = "",
    abilities: tuple[str, ...] = (),
    watch: float = 0.0,
) -> RelayHello:
    """The first request on a link. ``now`` is Unix seconds; ``node_id`` is empty while the caller is unknown."""
    proof = signer.sign_claims(
        {
            "iss": signer.relay_id,
            "aud": node_id,
            "nonce": nonce,
            "channel": channel,
            "iat": int(now),
            "exp": int(now) + PROOF_LIFE,
        }
    )
    return RelayHello(
        relay_id=signer.relay_id,
        nonce=nonce,
        proof=proof,
        key_certificate=signer.key_certificate,
        version=version,
        abilities=list(abilities),
        watch=watch,
    )


def verify_relay_hello_untrusted(
    document: bytes, *, verifier: TicketVerifier, node_id: str, channel: str, now: float
) -> RelayHello:
    """The relay's hello, proven to come from the pinned relay over this very channel. Raises only `ProtocolError`."""
    if len(document) > MAX_HELLO:
        raise ProtocolError("The relay's hello is too large.")
    hello = decode_untrusted(document, RelayHello)
    if not _NONCE.fullmatch(hello.nonce):
        raise ProtocolError("The relay's hello carries no proper nonce.")
    if hello.relay_id != verifier.relay_id:
        raise ProtocolError("Another relay answered than the one this agent is enrolled with.")
    claims = verifier.claims_untrusted(hello.proof, now)
    if claims.get("aud") not in ("", node_id):
        raise ProtocolError("The relay's proof is meant for another agent.")
    if claims.get("nonce") != hello.nonce:
        raise ProtocolError("The relay's proof does not belong to its hello.")
    if claims["exp"] - claims["iat"] > MAX_PROOF_LIFE:
        raise ProtocolError("The relay's proof is valid for longer than any honest relay asks.")
    if claims.get("channel") != channel:
        raise ProtocolError(
            "Somebody between this agent and the relay intercepts the connection: the certificate seen here is not "
            "the relay's own. Ask the network's operator to let connections to the relay through untouched.",
            code="INTERCEPTED",
            who="you",
        )
    return hello


def _signed_bytes(nonce: str, channel: str, relay_id: str, node_id: str) -> bytes:
    return b"towpath-link-1\0" + b"\0".join(part.encode("ascii") for part in (nonce, channel, relay_id, node_id))


def make_agent_hello(
    hello: RelayHello,
    identity: NodeKey,
    *,
    node_id: str,
    endpoint_id: str,
    channel: str,
    fields: HelloFields,
    watch: float = 0.0,
) -> AgentHello:
    """The agent's answer to a hello that was verified."""
    signature = identity.sign(_signed_bytes(hello.nonce, channel, hello.relay_id, node_id))
    return AgentHello(
        node_id=node_id,
        endpoint_id=endpoint_id,
        signature=base64.urlsafe_b64encode(signature).decode().rstrip("="),
        certificate=identity.certificate_pem,
        version=fields.version,
        abilities=list(fields.abilities),
        collections=list(fields.collections),
        boot_id=fields.boot_id,
        paused=fields.paused,
        last_event=fields.last_event,
        tasks=fields.tasks,
        watch=watch,
        candidates=list(fields.candidates),
    )


def read_agent_hello_untrusted(document: bytes) -> AgentHello:
    """The agent's hello, well-formed but not proven: good for looking up whose it claims to be.

    Raises only `ProtocolError`.
    """
    if len(document) > MAX_HELLO:
        raise ProtocolError("The agent's hello is too large.")
    hello = decode_untrusted(document, AgentHello)
    if not _ID.fullmatch(hello.node_id) or not _ID.fullmatch(hello.endpoint_id):
        raise ProtocolError("The agent's hello names no proper node.")
    if len(hello.collections) > MAX_COLLECTIONS or len(hello.abilities) > MAX_ABILITIES:
        raise ProtocolError("The agent's hello lists more than any honest agent has.")
    check_candidates_untrusted(hello.candidates)
    return hello


def verify_agent_hello_untrusted(
    hello: AgentHello, *, certificate: str, nonce: str, channel: str, relay_id: str
) -> None:
    """Check that the holder of ``certificate`` (PEM, as enrolled) signed this nonce on this channel.

    Raises only `ProtocolError`.
    """
    if not certificates_agree_untrusted(hello.certificate, certificate):
        raise ProtocolError("The agent shows another key than the one it was enrolled with.", code="WRONG_KEY")
    if not _CHANNEL.fullmatch(channel) or not _NONCE.fullmatch(nonce):
        raise ValueError("The channel or the nonce of this relay is malformed.")
    try:
        padded = hello.signature + "=" * (-len(hello.signature) % 4)
        signature = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
        public_key = public_key_of_certificate_untrusted(certificate)
        public_key.verify(signature, _signed_bytes(nonce, channel, relay_id, hello.node_id))
    except (binascii.Error, UnicodeEncodeError, ValueError) as error:
        raise ProtocolError("The signature in the agent's hello cannot be read.") from error
    except InvalidSignature as error:
        raise ProtocolError(
            "The agent's signature is not valid for this connection: the key is wrong, or somebody in between "
            "intercepts the connection.",
            code="WRONG_KEY",
        ) from error

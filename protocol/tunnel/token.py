"""Halves of a pairing: what lets one agent, once and soon, be joined with one other through one relay process.

A token is a JWT signed as tickets are (`protocol.ticket`). It names the relay *process* that issued it, so that none
outlives the memory of which were used already.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from protocol.control import Record
from protocol.errors import AccessDenied, ProtocolError
from protocol.ticket import TicketSigner, TicketVerifier

ALPN = "towpath-tunnel/1"
AUDIENCE = "towpath-tunnel"
# Seconds from the issue of a token to its last use: the time to open one connection, with room for slow networks.
LIFE = 60.0
MAX_TOKEN = 4096

Side = Literal["source", "destination"]
_ID = re.compile(r"[0-9a-f-]{36}")
_USER = re.compile(r"[\x21-\x7e]{0,128}")


class TunnelRefused(AccessDenied):
    """The relay does not join this connection with any other."""

    default_code = "TUNNEL_REFUSED"


class Half(Record, frozen=True, kw_only=True):
    """One side of one pairing. ``relay_node`` names the relay process, ``user`` whose quota counts."""

    relay_node: str
    pair_id: str
    session_id: str
    side: Side
    user: str
    issued: float
    expires: float


class _Claims(msgspec.Struct, frozen=True):
    node: str
    pair: str
    sid: str
    side: Side
    user: str
    iat: float
    exp: float


def sign_half(signer: TicketSigner, half: Half) -> str:
    """The half as it travels."""
    return signer.sign_claims(
        {
            "iss": signer.relay_id,
            "aud": AUDIENCE,
            "node": half.relay_node,
            "pair": half.pair_id,
            "sid": half.session_id,
            "side": half.side,
            "user": half.user,
            "iat": half.issued,
            "exp": half.expires,
        }
    )


def half_untrusted(token: str, verifier: TicketVerifier, *, relay_node: str, now: float) -> Half:
    """The half in a token, if this very relay process issued it and its time has not passed.

    ``now`` is Unix seconds of the machine that issued it, so no allowance is made for clocks. Raises only
    `ProtocolError` for what no relay signed, and `TunnelRefused` for what is signed but does not count here and now.
    """
    if len(token) > MAX_TOKEN:
        raise ProtocolError("The tunnel token is too large.")
    claims = verifier.claims_untrusted(token, now, AUDIENCE)
    try:
        parsed = msgspec.convert(claims, _Claims)
    except msgspec.ValidationError as error:
        raise ProtocolError("The tunnel token is malformed.") from error
    if not (_ID.fullmatch(parsed.pair) and _ID.fullmatch(parsed.sid) and _USER.fullmatch(parsed.user)):
        raise ProtocolError("The tunnel token is malformed.")
    if parsed.node != relay_node:
        raise TunnelRefused("The tunnel token was issued by another relay process; ask for a new one.")
    if not parsed.iat <= now <= parsed.exp:
        raise TunnelRefused("The tunnel token has expired; ask for a new one.", code="TUNNEL_EXPIRED")
    return Half(
        relay_node=parsed.node,
        pair_id=parsed.pair,
        session_id=parsed.sid,
        side=parsed.side,
        user=parsed.user,
        issued=parsed.iat,
        expires=parsed.exp,
    )

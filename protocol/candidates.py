"""Candidates: where a node may be reached, how two nodes tell each other through the relay, and what may be dialled.

A destination that wants a path sends a `PathOffer` with its candidates, the relay passes it to the source, the source
answers with a `PathAnswer`, and the relay gives both a `PathGo` so timed that they begin at one instant. Every
message carries the generation of the offer; what belongs to an older one is ignored.

Candidates come from a peer: an agent must not become a tool to scan or flood places its owner did not mean, so all of
them pass `usable_untrusted` before anything is dialled.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Literal

import msgspec

from protocol.errors import ProtocolError
from protocol.record import Record

# An address of the node's own interfaces or one its owner configured; what a STUN server sees of a local TCP or UDP
# port; a mapping that a router granted; a place at the relay's tunnel, with this side's token.
HOST, MAPPED_TCP, MAPPED_UDP, PORTMAP, RELAY_TUNNEL = "host", "mapped-tcp", "mapped-udp", "portmap", "relay-tunnel"
KINDS = frozenset({HOST, MAPPED_TCP, MAPPED_UDP, PORTMAP, RELAY_TUNNEL})
# Kinds that are dialled over plain TCP without any arrangement.
DIALLED = frozenset({HOST, PORTMAP})

# Of one peer in one message, and punching ports in one offer.
MAX_CANDIDATES = 64
MAX_SLOTS = 9
MAX_HOST = 255
# The generation of what the relay arranges without an offer; those of offers are higher.
MEETING = 0
MAX_TOKEN = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Addresses that mean something only inside a site: RFC 1918, RFC 6598 (carrier-grade NAT), RFC 4193.
INSIDE: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)


class Candidate(Record, frozen=True, kw_only=True):
    """A place where a node may be reached.

    ``slot`` 0 is the node's data port, where it listens anyway; 1 and up are ports opened for one offer, each for one
    connection. ``token`` is what a tunnel or transport needs besides the address.
    """

    kind: str
    host: str
    port: int
    slot: int = 0
    token: str = ""


class PathOffer(Record, frozen=True, kw_only=True):
    """Destination to source: arrange paths for this session.

    ``token`` (hex) is what the source says first on connections that it dials to slot 0 (`protocol.reversal`);
    ``count`` is how many connections are wanted. An offer repeated with the same ``generation`` adds candidates.
    ``observed`` and ``peer_observed`` are added by the relay: the addresses from which it sees the reader's and the
    other side's link. With ``probe`` the destination only wants to know whether there is a way, also after the task has
    ended: connections are closed as soon as they are there, and nothing is said on them.
    """

    session_id: str
    task_id: str
    generation: int
    token: str
    count: int
    candidates: list[Candidate] = []
    transports: list[str] = []
    observed: str = ""
    peer_observed: str = ""
    probe: bool = False


class PathAnswer(Record, frozen=True, kw_only=True):
    """Source to relay, and on to the destination within `PathGo`: where this side is, for this generation."""

    session_id: str
    generation: int
    candidates: list[Candidate] = []
    transports: list[str] = []


class PathGo(Record, frozen=True, kw_only=True):
    """Relay to both sides: begin punching ``start_in`` seconds after this was read.

    ``answer`` is set for the destination. ``tunnels`` are this side's places at the relay's tunnel, one for each
    connection, if it may use any; a transport is given one at a time, as ``tunnel``. ``tunnel_refused`` says to the
    destination, in a sentence for people, why it may not.

    A go of `MEETING` answers no offer: it says to both sides of an `Arrangement` where the relay has seen the other
    side's punching ports, in ``candidates``.
    """

    session_id: str
    generation: int
    start_in: float
    answer: PathAnswer | None = None
    candidates: list[Candidate] = []
    tunnel: Candidate | None = None
    tunnels: list[Candidate] = []
    tunnel_refused: str = ""
    observed: str = ""
    peer_observed: str = ""


class Arrangement(Record, frozen=True, kw_only=True):
    """Relay to both sides, with the order and the session of a task: a path, before either has asked for one.

    The source dials the destination's ``candidates`` (the destination finds the source's in its session) for ``count``
    connections, and says ``token`` first on them, as for an offer. ``tunnels`` are this side's places at the relay's
    tunnel, one for each connection. ``observed`` and ``peer_observed`` as in `PathOffer`.

    ``show`` is what this side says to the relay's STUN service over TCP from its punching ports (`stun.PortNote`): the
    source from its data port as slot 0, the destination from ``count`` fresh ports as slots 1 and up. When the relay
    has seen all of them, both get a `PathGo` of the generation `MEETING`. Empty: nobody waits for that.
    """

    token: str
    count: int
    candidates: list[Candidate] = []
    tunnels: list[Candidate] = []
    show: str = ""
    observed: str = ""
    peer_observed: str = ""


Verdict = Literal["ok", "not an address", "never dialled", "loopback", "own address", "inside address"]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What this node may dial for one peer.

    ``own`` are this node's addresses and ``networks`` those of its interfaces. ``loopback`` is true for a peer on this
    very machine (or where the owner allows it). ``same_site``: the relay sees both nodes behind one address, so the
    peer's inside addresses may be the shortest way. ``observed`` is the peer's address as the relay sees it.
    """

    own: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    loopback: bool = False
    same_site: bool = False
    observed: str = ""


def parse_address_untrusted(text: str) -> Address:
    """An IP address without a zone, a mapped IPv4 one as IPv4; names are never looked up. Raises `ProtocolError`."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise ProtocolError("A candidate of the peer is no IP address.") from error
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ProtocolError("A candidate of the peer carries a zone.")
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
    return address


def is_inside(address: Address) -> bool:
    """Whether an address means something only inside a site."""
    return any(address in network for network in INSIDE if network.version == address.version)


def verdict_untrusted(host: str, rules: Rules) -> Verdict:
    """Whether an address of a peer may be dialled, or why not."""
    try:
        address = parse_address_untrusted(host)
    except ProtocolError:
        return "not an address"
    if address.is_multicast or address.is_unspecified or address.is_link_local:
        return "never dialled"
    # IPv6's own loopback lies in a reserved block, so it is looked at first.
    if address.is_loopback:
        return "ok" if rules.loopback else "loopback"
    if address.is_reserved or (isinstance(address, ipaddress.IPv4Address) and address in _THIS_NETWORK):
        return "never dialled"
    if str(address) in rules.own:
        return "ok" if rules.loopback else "own address"
    if is_inside(address) and not (
        rules.same_site
        or rules.loopback
        or str(address) == rules.observed
        or any(address in network for network in rules.networks if network.version == address.version)
    ):
        return "inside address"
    return "ok"


_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")


def usable_untrusted(candidates: Iterable[Candidate], rules: Rules) -> list[Candidate]:
    """A peer's candidates that may be used, in its order, normalised, without repetitions, at most `MAX_CANDIDATES`.

    A place at the relay's tunnel is not an address to dial and passes as it is. Raises nothing.
    """
    kept: dict[tuple[str, str, int, int], Candidate] = {}
    for candidate in candidates:
        if len(kept) >= MAX_CANDIDATES:
            break
        if candidate.kind not in KINDS or not 0 <= candidate.slot <= MAX_SLOTS or len(candidate.token) > MAX_TOKEN:
            continue
        if not 0 < candidate.port < 65536 or len(candidate.host) > MAX_HOST:
            continue
        host = candidate.host
        if candidate.kind != RELAY_TUNNEL:
            if verdict_untrusted(host, rules) != "ok":
                continue
            host = str(parse_address_untrusted(host))
            candidate = msgspec.structs.replace(candidate, host=host)
        kept.setdefault((candidate.kind, host, candidate.port, candidate.slot), candidate)
    return list(kept.values())


def check_candidates_untrusted(candidates: list[Candidate]) -> None:
    """What a relay passes on must at least have the form of candidates. Raises `ProtocolError`."""
    if len(candidates) > MAX_CANDIDATES:
        raise ProtocolError("A peer named too many addresses.")
    for candidate in candidates:
        if not 0 < candidate.port < 65536 or not 0 < len(candidate.host) <= MAX_HOST or len(candidate.kind) > 32:
            raise ProtocolError("A peer named an address that cannot be one.")
        if not 0 <= candidate.slot <= MAX_SLOTS or len(candidate.token) > MAX_TOKEN:
            raise ProtocolError("A peer named a port that cannot be one.")

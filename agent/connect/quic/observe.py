"""Where a UDP socket of this machine may be reached: its interfaces' addresses, and what the relay's STUN sees."""

from __future__ import annotations

import socket

import trio

from agent.connect.network import Network
from agent.connect.stun_client import observe_udp_at_all, resolve
from agent.connect.udp import has_ipv6
from protocol import stun
from protocol.candidates import MAPPED_UDP, Candidate, PathGo, usable_untrusted

# An offer does not wait longer than this (seconds) for a relay whose UDP does not come through.
PATIENCE = 0.3
MAX_OWN = 8


async def udp_candidates(network: Network, sock: trio.socket.SocketType) -> list[Candidate]:
    """Candidates of a socket of `agent.connect.udp`. Takes at most `PATIENCE`."""
    port = sock.getsockname()[1]
    families = [socket.AF_INET, *([socket.AF_INET6] if has_ipv6(sock.family) else [])]
    own = [host for host in network.interfaces.addresses if ":" not in host or socket.AF_INET6 in families]
    hosts = own[:MAX_OWN]
    if network.allow_loopback:
        hosts.append("127.0.0.1")
    found: list[stun.BindingAnswer] = []
    if network.relay is not None and network.stun_ports:
        with trio.move_on_after(PATIENCE):
            servers = []
            for family in families:
                servers += (await resolve(network.relay[0], network.stun_ports[0], family))[:1]
            await observe_udp_at_all(sock, servers, found)
    seen = [answer.mapped for answer in found if answer.mapped[0] not in hosts]
    outside = [Candidate(kind=MAPPED_UDP, host=host, port=number) for host, number in dict.fromkeys(seen)]
    return [*outside, *(Candidate(kind=MAPPED_UDP, host=host, port=port) for host in hosts)]


def udp_targets(network: Network, candidates: list[Candidate], go: PathGo) -> list[Candidate]:
    """Those of a peer's candidates that may be probed, each counted like a dial."""
    rules = network.rules(loopback=False, observed=go.observed, peer_observed=go.peer_observed)
    wanted = [row for row in candidates if row.kind == MAPPED_UDP]
    return [row for row in usable_untrusted(wanted, rules) if network.may_dial()]

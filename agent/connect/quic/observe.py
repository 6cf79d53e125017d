"""Where a UDP socket of this machine may be reached: its interfaces' addresses, and what the relay's STUN sees."""

from __future__ import annotations

import socket

import trio

from agent.connect.network import Network
from agent.connect.stun_client import observe_udp, resolve
from protocol.candidates import MAPPED_UDP, Candidate, PathGo, usable_untrusted

# An offer does not wait longer than this (seconds) for a relay whose UDP does not come through.
PATIENCE = 0.3
MAX_OWN = 8


async def udp_candidates(network: Network, sock: trio.socket.SocketType) -> list[Candidate]:
    """Candidates of a bound IPv4 UDP socket. Takes at most `PATIENCE`."""
    port = sock.getsockname()[1]
    hosts = [host for host in network.interfaces.addresses if ":" not in host][:MAX_OWN]
    if network.allow_loopback:
        hosts.append("127.0.0.1")
    candidates = [Candidate(kind=MAPPED_UDP, host=host, port=port) for host in hosts]
    if network.relay is None or not network.stun_ports:
        return candidates
    with trio.move_on_after(PATIENCE):
        for server in (await resolve(network.relay[0], network.stun_ports[0], socket.AF_INET))[:1]:
            answer = await observe_udp(sock, server)
            if answer is not None and answer.mapped[0] not in hosts and ":" not in answer.mapped[0]:
                candidates.insert(0, Candidate(kind=MAPPED_UDP, host=answer.mapped[0], port=answer.mapped[1]))
    return candidates


def udp_targets(network: Network, candidates: list[Candidate], go: PathGo) -> list[Candidate]:
    """Those of a peer's candidates that may be probed, each counted like a dial."""
    rules = network.rules(loopback=False, observed=go.observed, peer_observed=go.peer_observed)
    wanted = [row for row in candidates if row.kind == MAPPED_UDP]
    return [row for row in usable_untrusted(wanted, rules) if network.may_dial()]

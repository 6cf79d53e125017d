"""What this agent knows of its place in the network: data port, addresses, how the relay sees it, what it may dial."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from agent.connect.addresses import Interfaces, look, own_candidates, rules_for
from agent.connect.listener import DataPort
from agent.connect.relayed_peers import RelayedPeers
from agent.connect.stun_client import NotObserved, note_again, observe_tcp, resolve
from agent.connect.transport import Transports
from protocol.candidates import MAPPED_TCP, Candidate, Rules
from protocol.control import RelayHello
from protocol.stun import PortNote

# Addresses of peers dialled at once, and again in every second: no peer makes this agent scan or flood anything.
DIAL_BURST, DIALS_A_SECOND = 200, 20.0
LOOK_EVERY = 10.0
# The relay closes a connection that asks nothing for 40 s, and with it goes what a NAT knew of it.
OBSERVATION_LIFE = 25.0
# The relay answers so many questions on one connection, and a few more.
MAX_NOTES = 48


class DialAllowance:
    """A token bucket over all dials of addresses that peers named. ``now`` in seconds, monotonic."""

    def __init__(self, now: float, burst: float = DIAL_BURST, rate: float = DIALS_A_SECOND) -> None:
        self._burst, self._rate = burst, rate
        self._tokens, self._then = burst, now
        self.refused = 0

    def take(self, now: float) -> bool:
        """Whether one more address may be dialled now."""
        self._tokens = min(self._burst, self._tokens + (now - self._then) * self._rate)
        self._then = now
        if self._tokens < 1:
            self.refused += 1
            return False
        self._tokens -= 1
        return True


@dataclass
class Observation:
    """How the relay sees the data port, and the connection that keeps it so."""

    candidate: Candidate
    held: socket.socket
    since: float
    users: int = 1
    notes: int = 0


@dataclass
class Network:
    """One for each agent, put together by the daemon. ``relay`` is host and port of the relay, None behind a proxy."""

    relay: tuple[str, int] | None
    advertise: tuple[str, ...] = ()
    allow_loopback: bool = False
    relay_policy: str = "allow"
    transports: Transports = field(default_factory=Transports)
    # Granted port mappings of the data port, kept by `agent.connect.portmap`.
    mappings: list[Candidate] = field(default_factory=list)
    stun_ports: list[int] = field(default_factory=list)
    data_port: DataPort | None = None
    observed: str = ""
    interfaces: Interfaces = field(default_factory=look)
    allowance: DialAllowance = field(default_factory=lambda: DialAllowance(time.monotonic()))
    relayed: RelayedPeers = field(default_factory=RelayedPeers)
    changed: trio.Event = field(default_factory=trio.Event)
    # Set, and replaced, when a router has granted a mapping.
    mapped: trio.Event = field(default_factory=trio.Event)
    # Whether there is a link to the relay. The daemon sets it later than the first tasks begin: never keep what it is.
    relay_up: Callable[[], bool] = lambda: True
    # Set, and replaced, when there is a link again.
    linked: trio.Event = field(default_factory=trio.Event)
    # Tells this start of the agent from those before and after it.
    instance: str = field(default_factory=partial(secrets.token_hex, 8))
    # Addresses of the names that the owner advertises, as last looked up.
    _looked_up: dict[str, list[str]] = field(default_factory=dict)
    _observation: Observation | None = None
    _observing: trio.Lock = field(default_factory=trio.Lock)

    def rules(self, *, loopback: bool, observed: str, peer_observed: str) -> Rules:
        """What may be dialled for one peer; ``loopback`` for a peer that is this very node."""
        if observed:
            self.observed = observed
        return rules_for(
            self.interfaces,
            loopback=loopback or self.allow_loopback,
            observed=observed,
            peer_observed=peer_observed,
        )

    async def host_candidates(self, *, loopback: bool = False) -> list[Candidate]:
        """Addresses of the data port that need no arrangement; names the owner configured are looked up."""
        if self.data_port is None:
            return []
        advertise: list[str] = []
        for name in self.advertise:
            rows = [] if _is_ip(name) else await _addresses(name)
            self._looked_up[name] = list(rows) or [name]
            advertise += self._looked_up[name]
        return self._candidates(self.data_port, advertise, loopback=loopback or self.allow_loopback)

    def standing_candidates(self) -> list[Candidate]:
        """The same as far as it is known without looking anything up."""
        names = [name for name in self.advertise if not _is_ip(name)]
        if self.data_port is None or not all(name in self._looked_up for name in names):
            return []
        advertise = [host for name in self.advertise for host in self._looked_up.get(name, [name])]
        return self._candidates(self.data_port, advertise, loopback=self.allow_loopback)

    def _candidates(self, port: DataPort, advertise: list[str], *, loopback: bool) -> list[Candidate]:
        found = own_candidates(port.port, self.interfaces, advertise, families=port.families, loopback=loopback)
        return [*found, *self.mappings]

    async def stun_server(self) -> tuple[str, int] | None:
        """The relay's IPv4 address, which stands on the far side of every NAT; None where there is none."""
        if self.relay is None:
            return None
        found = await resolve(*self.relay, socket.AF_INET)
        return found[0] if found else None

    async def observe_data_port(self, note: PortNote | None = None) -> Observation | None:
        """How the relay sees the data port over TCP, or None. Give it back with `release`: it is shared, because one
        port can have one connection to one server. With a ``note`` the relay is told for what it is."""
        async with self._observing:
            if self._observation is not None:
                if self._serves(self._observation, note):
                    self._observation.users += 1
                    return self._observation
                # Its other users go on with what they know; the port can have but one connection to the relay.
                self._observation.held.close()
                self._observation = None
            server = await self.stun_server()
            if server is None or self.data_port is None or socket.AF_INET not in self.data_port.families:
                return None
            try:
                mapped, held = await observe_tcp(("0.0.0.0", self.data_port.port), server, note)  # noqa: S104 - the data port's own address
            except NotObserved:
                return None
            candidate = Candidate(kind=MAPPED_TCP, host=mapped[0], port=mapped[1])
            self._observation = Observation(candidate, held, trio.current_time())
            return self._observation

    def _serves(self, known: Observation, note: PortNote | None) -> bool:
        if trio.current_time() - known.since >= OBSERVATION_LIFE:
            return False
        if note is None:
            return True
        known.notes += 1
        return known.notes <= MAX_NOTES and note_again(known.held, note)

    def release(self, observation: Observation) -> None:
        """An observation is no longer needed by one of its users."""
        observation.users -= 1
        if observation.users == 0:
            observation.held.close()
            if self._observation is observation:
                self._observation = None

    def take_mappings(self, mappings: list[Candidate]) -> None:
        """What the router maps to the data port now. Races under way hear of what is new."""
        fresh = any(row not in self.mappings for row in mappings)
        self.mappings = mappings
        if fresh:
            self.mapped.set()
            self.mapped = trio.Event()

    def take_hello(self, hello: RelayHello) -> None:
        """What the relay tells about itself at each link. Whoever waits for `linked` goes on."""
        self.stun_ports = [port for port in hello.stun_ports[:4] if 0 < port < 65536]
        self.linked.set()
        self.linked = trio.Event()

    def may_dial(self) -> bool:
        """Whether one more address of a peer may be dialled now."""
        return self.allowance.take(time.monotonic())

    async def watch(self) -> None:
        """Notice changes of the interfaces, and wake-ups from sleep, until cancelled; `changed` is set for each."""
        while True:
            before, wall = trio.current_time(), time.time()
            await trio.sleep(LOOK_EVERY)
            slept = (time.time() - wall) - (trio.current_time() - before) > LOOK_EVERY
            try:
                interfaces = await trio.to_thread.run_sync(look)
            except OSError:
                # No descriptor to ask the system with, at this moment.
                interfaces = self.interfaces
            if slept or interfaces != self.interfaces:
                self.interfaces = interfaces
                self.announce_change()

    def _families(self) -> frozenset[int]:
        return frozenset() if self.data_port is None else frozenset(int(row) for row in self.data_port.families)

    def announce_change(self) -> None:
        """The network is not what it was: whoever waits for `changed` gathers anew."""
        self._observation = None
        self.relayed.forget()
        self.changed.set()
        self.changed = trio.Event()

    def statistics(self) -> dict[str, Any]:
        """For `towpath status`."""
        return {
            "addresses": list(self.interfaces.addresses),
            "observed": self.observed,
            "families": sorted("IPv6" if row == socket.AF_INET6 else "IPv4" for row in self._families()),
            "stun_ports": self.stun_ports,
            "direct_relay": self.relay is not None,
            "mappings": [f"{row.host} port {row.port}" for row in self.mappings],
            "transports": [name for name in ("tunnel", "quic") if getattr(self.transports, name) is not None],
            "relay": self.relay_policy,
            "dials_refused": self.allowance.refused,
        }


def _is_ip(name: str) -> bool:
    return ":" in name or name.replace(".", "").isdigit()


async def _addresses(name: str) -> Iterable[str]:
    with trio.move_on_after(3.0):
        try:
            rows = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError:
            return []
        return list(dict.fromkeys(str(row[4][0]) for row in rows))
    return []

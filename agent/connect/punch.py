"""Synchronised TCP simultaneous open: both sides connect so that their SYNs cross (RFC 9293, section 3.5).

What was measured on real NATs is built in: a pending connect is left pending (closing and reopening it faster than two
round trips never succeeds) and begun anew only after an error, at once where a NAT answered with RST; a listener stands
on the punching port, because the other side's SYN may come from another port than expected; every socket of the port
shares it. An address that is "not available" may simply have been accepted by that listener already.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from agent.connect.listener import detached, reusable
from agent.connect.stun_client import NotObserved, observe_tcp
from protocol.candidates import HOST, MAPPED_TCP, Candidate
from protocol.congestion import leave_bbr
from protocol.round_trip import dialled_round_trip, round_trip
from protocol.stun import PortNote

# Seconds until another try after an error; and how many there may be of one pair of addresses.
AGAIN_REFUSED, AGAIN = 0.01, 0.1
MAX_TRIES = 60
PUNCH_TIME = 4.0
_TAKEN = {errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EISCONN}
_WILDCARD = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104 - a punching port takes what comes


def family_of(host: str) -> socket.AddressFamily:
    """The address family of an IP address in text."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@dataclass(frozen=True)
class Punched:
    """A connection, and its round-trip time in seconds where that is known."""

    sock: socket.socket
    rtt: float | None


async def connect_from(port: int, target: tuple[str, int], *, tries: int = MAX_TRIES) -> Punched:
    """A connection from a shared local port, begun again after errors. Raises OSError when out of tries."""
    family = family_of(target[0])
    while True:
        plain = reusable(family)
        plain.setblocking(False)
        sock = trio.socket.from_stdlib_socket(plain)
        try:
            await sock.bind((_WILDCARD[family], port))
            begun = trio.current_time()
            await sock.connect(target)
            rtt = dialled_round_trip(sock, trio.current_time() - begun)
            if rtt is not None:
                leave_bbr(sock, rtt)
            return Punched(detached(sock), rtt)
        except OSError as error:
            tries -= 1
            if tries <= 0:
                raise
            refused = error.errno in (errno.ECONNREFUSED, errno.ECONNRESET)
            pause = AGAIN_REFUSED if refused else AGAIN * (4 if error.errno in _TAKEN else 1)
        finally:
            sock.close()
        await trio.sleep(pause)


@dataclass
class Slot:
    """One punching port at the destination: listeners, and what the relay sees of it. Close it after use."""

    number: int
    listeners: dict[socket.AddressFamily, socket.socket]
    observing: list[socket.socket] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    def port(self, family: socket.AddressFamily) -> int | None:
        """The port number in one address family."""
        listener = self.listeners.get(family)
        return None if listener is None else int(listener.getsockname()[1])

    def close(self) -> None:
        """Close everything. Safe to call twice."""
        for sock in [*self.listeners.values(), *self.observing]:
            sock.close()
        self.listeners.clear()
        self.observing.clear()


def open_slot(number: int, families: Sequence[socket.AddressFamily]) -> Slot:
    """A fresh port with listeners. Families that this machine does not have are left out. Raises OSError for none."""
    slot = Slot(number, {})
    failure: OSError | None = None
    for family in families:
        try:
            sock = reusable(family)
        except OSError as error:
            failure = error
            continue
        try:
            sock.bind((_WILDCARD[family], 0))
            sock.listen(8)
            sock.setblocking(False)
            slot.listeners[family] = sock
        except OSError as error:
            sock.close()
            failure = error
    if not slot.listeners:
        raise failure or OSError(errno.EAFNOSUPPORT, "no address family")
    return slot


async def gather_slot(
    slot: Slot, server: tuple[str, int] | None, own_v6: Sequence[str], token: bytes | None = None
) -> str:
    """Find the slot's candidates: what the relay sees of its IPv4 port, and this machine's IPv6 addresses. With a
    ``token`` the relay is told whose port it sees.

    Returns why the relay could not be asked, or an empty text.
    """
    why = ""
    port6 = slot.port(socket.AF_INET6)
    if port6 is not None:
        slot.candidates += [Candidate(kind=HOST, host=host, port=port6, slot=slot.number) for host in own_v6[:4]]
    if server is not None:
        family = family_of(server[0])
        port = slot.port(family)
        if port is not None:
            try:
                note = None if token is None else PortNote(token, slot.number, port6 or 0)
                mapped, held = await observe_tcp((_WILDCARD[family], port), server, note)
            except NotObserved as error:
                why = error.sentence
            else:
                slot.observing.append(held)
                slot.candidates.insert(0, Candidate(kind=MAPPED_TCP, host=mapped[0], port=mapped[1], slot=slot.number))
    return why


async def punch(slot: Slot, targets: Sequence[Candidate], hosts: frozenset[str]) -> Punched:
    """The first connection between a slot's port and the peer, whoever was faster. Raises OSError after `PUNCH_TIME`.

    Incoming connections count only from ``hosts``, the addresses the peer is known by.
    """
    found: list[Punched] = []
    errors: list[str] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + PUNCH_TIME

            def won(one: Punched) -> None:
                found.append(one)
                nursery.cancel_scope.cancel()

            async def dial(target: Candidate) -> None:
                port = slot.port(family_of(target.host))
                if port is None:
                    return
                try:
                    won(await connect_from(port, (target.host, target.port)))
                except OSError as error:
                    errors.append(error.strerror or str(error))

            async def take(listener: socket.socket) -> None:
                while True:
                    try:
                        won(await _taken(listener, hosts))
                    except OSError as error:
                        # No descriptor to be had now, mostly; there may be one in a moment.
                        errors.append(error.strerror or str(error))
                        await trio.sleep(AGAIN)
                    else:
                        return

            for listener in slot.listeners.values():
                nursery.start_soon(take, listener)
            for target in targets:
                nursery.start_soon(dial, target)
    except BaseException:
        # Whoever wanted the connection does not want it any more.
        for one in found:
            one.sock.close()
        raise
    for extra in found[1:]:
        extra.sock.close()
    if found:
        return found[0]
    raise OSError(errno.ETIMEDOUT, errors[0] if errors else "nothing came through")


async def _taken(listener: socket.socket, hosts: frozenset[str]) -> Punched:
    """What one of these hosts dials. Raises OSError."""
    # Another object for the same socket, so that cancelling here closes nothing of the slot's.
    with trio.socket.from_stdlib_socket(listener.dup()) as shared:
        while True:
            sock, source = await shared.accept()
            with sock:
                if source[0].partition("%")[0] in hosts:
                    return Punched(detached(sock), round_trip(sock))

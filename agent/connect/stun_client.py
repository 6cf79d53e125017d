"""Asking the relay's STUN server how this machine is seen, from a given local port: over TCP and over UDP."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from agent.connect.listener import reusable
from agent.connect.udp import outgoing
from protocol import stun
from protocol.errors import ProtocolError, RetryLater

TIMEOUT = 3.0
_TRIES = (0.25, 0.5, 1.0)


class NotObserved(RetryLater):
    """No STUN server answered."""

    default_code = "STUN_UNREACHABLE"


async def resolve(host: str, port: int, family: socket.AddressFamily) -> list[tuple[str, int]]:
    """Addresses of the relay of one family; empty when it has none."""
    try:
        rows = await trio.socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [(str(row[4][0]), port) for row in rows]


async def observe_tcp(
    local: tuple[str, int], server: tuple[str, int], note: stun.PortNote | None = None
) -> tuple[stun.Endpoint, socket.socket]:
    """The address at which connections from a local TCP port are seen, and the connection that keeps it so. With a
    ``note`` the relay knows whose port it sees.

    The caller closes the socket when the mapping is no longer needed. Raises `NotObserved`.
    """
    try:
        plain = reusable(socket.AF_INET6 if ":" in server[0] else socket.AF_INET)
    except OSError as error:
        raise NotObserved(f"The relay's STUN service cannot be asked: {error}.") from error
    plain.setblocking(False)
    sock = trio.socket.from_stdlib_socket(plain)
    try:
        # Closed with a reset, also when nobody answers or waits any more: saying goodbye in order takes a minute or
        # more, in which the port could not ask this server again.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with trio.fail_after(TIMEOUT):
            await sock.bind(local)
            await sock.connect(server)
            transaction = stun.new_transaction()
            await sock.send(stun.encode_request(transaction, note=note))
            answer = stun.parse_answer_untrusted(await _message(sock))
        if answer.transaction != transaction:
            raise ProtocolError("A STUN message answers another question than was asked.")
        kept = sock.dup()
        return answer.mapped, socket.socket(fileno=kept.detach())
    except (OSError, ProtocolError, trio.TooSlowError) as error:
        raise NotObserved(f"The relay's STUN service cannot be used over TCP: {error}.") from error
    finally:
        sock.close()


def note_again(held: socket.socket, note: stun.PortNote) -> bool:
    """Say on a connection of `observe_tcp` for what else its port is to be used; whether it took that. Nobody reads the
    answer, which says what is known."""
    request = stun.encode_request(stun.new_transaction(), note=note)
    try:
        return held.send(request) == len(request)
    except OSError:
        return False


async def _message(sock: trio.socket.SocketType) -> bytes:
    data = b""
    while (length := stun.stream_length_untrusted(data)) is None or len(data) < length:
        more = await sock.recv((length or stun.HEADER) - len(data))
        if not more:
            raise ProtocolError("the connection was closed")
        data += more
    return data


async def observe_udp(
    sock: trio.socket.SocketType, server: tuple[str, int], *, change_port: bool = False
) -> stun.BindingAnswer | None:
    """The answer of a STUN server to a datagram from ``sock``; None when none comes in about two seconds.

    With ``change_port`` only an answer from another port of the server counts.
    """
    transaction = stun.new_transaction()
    request = stun.encode_request(transaction, change_port=change_port)
    for wait in _TRIES:
        try:
            await sock.sendto(request, server)
        except OSError:
            return None
        with trio.move_on_after(wait):
            while True:
                try:
                    data, source = await sock.recvfrom(stun.MAX_MESSAGE + 1)
                    answer = stun.parse_answer_untrusted(data)
                except (OSError, ProtocolError):
                    continue
                if answer.transaction == transaction and (source[1] != server[1]) == change_port:
                    return answer
    return None


async def observe_udp_at_all(
    sock: trio.socket.SocketType, servers: Sequence[tuple[str, int]], found: list[stun.BindingAnswer]
) -> None:
    """Ask several servers at once from one socket; ``found`` grows by the answers as they come, also when this is
    cancelled. Returns when all have answered, or after about two seconds."""
    waiting = {stun.new_transaction(): server for server in servers}
    for wait in _TRIES:
        for transaction, server in list(waiting.items()):
            try:
                await sock.sendto(stun.encode_request(transaction), outgoing(sock.family, server))
            except OSError:
                # There is no way there, as with a family that this network does not have.
                del waiting[transaction]
        with trio.move_on_after(wait):
            while waiting:
                try:
                    data, _ = await sock.recvfrom(stun.MAX_MESSAGE + 1)
                    answer = stun.parse_answer_untrusted(data)
                except (OSError, ProtocolError):
                    continue
                if waiting.pop(answer.transaction, None) is not None:
                    found.append(answer)
        if not waiting:
            return


@dataclass(frozen=True, kw_only=True)
class UdpBehaviour:
    """What stands between this machine and the relay, for UDP (RFC 5780 names). Empty texts: could not be told.

    ``mapping``: ``none`` (no NAT), ``endpoint-independent``, ``address-and-port-dependent``. ``filtering``: ``port``
    lets in only what answers, ``address`` also other ports of an address written to.
    """

    reachable: bool
    mapped: stun.Endpoint | None = None
    mapping: str = ""
    filtering: str = ""


async def udp_behaviour(host: str, ports: list[int], own: frozenset[str]) -> UdpBehaviour:
    """Ask both UDP ports of the relay from one socket and compare. Takes up to six seconds where UDP is blocked."""
    servers = [address for port in ports for address in (await resolve(host, port, socket.AF_INET))[:1]]
    if not servers:
        return UdpBehaviour(reachable=False)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("0.0.0.0", 0))  # noqa: S104 - a client's port
        first = await observe_udp(sock, servers[0])
        if first is None:
            return UdpBehaviour(reachable=False)
        mapping = filtering = ""
        if first.mapped[0] in own and first.mapped[1] == sock.getsockname()[1]:
            mapping = "none"
        if first.other is not None:
            # Before anything is sent to the other port.
            open_to_ports = await observe_udp(sock, servers[0], change_port=True) is not None
            filtering = "address" if open_to_ports else "port"
        if not mapping and len(servers) > 1:
            second = await observe_udp(sock, servers[1])
            if second is not None:
                same = second.mapped == first.mapped
                mapping = "endpoint-independent" if same else "address-and-port-dependent"
        return UdpBehaviour(reachable=True, mapped=first.mapped, mapping=mapping, filtering=filtering)

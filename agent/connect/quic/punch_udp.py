"""The punch of `agent.connect.quic.punch` on a real UDP socket."""

from __future__ import annotations

import socket

import trio

from agent.connect.quic.punch import OPENING_TTL, Address, Punch, Send
from agent.connect.udp import get_hops, incoming, outgoing, set_hops
from protocol.errors import RetryLater

# Seconds between two looks at what is due.
_STEP = 0.02


class QuicFailed(RetryLater):
    """No QUIC to the peer now."""

    default_code = "QUIC_FAILED"


async def punch(sock: trio.socket.SocketType, *, client: bool, secret: str, targets: list[Address]) -> Address:
    """Reach the peer; where it is. The server's side stays until the peer begins to speak QUIC, and goes on answering
    probes so long. Raises `QuicFailed`."""
    machine = Punch(client=client, secret=secret, targets=targets, now=trio.current_time())
    while trio.current_time() < machine.deadline:
        for send in machine.due(trio.current_time()):
            await _send_probe(sock, send)
        wait = max(0.0, min(machine.next_time() - trio.current_time(), _STEP))
        with trio.move_on_after(wait):
            try:
                data, source = await sock.recvfrom(2048, socket.MSG_PEEK)
            except OSError:
                # An ICMP error for one of the targets.
                continue
            if not client and machine.is_start_untrusted(data, incoming(source)) and machine.found is not None:
                # It stays in the socket for the process.
                return machine.found
            await sock.recvfrom(2048)
            for send in machine.receive_untrusted(data, incoming(source)):
                await _send_probe(sock, send)
        if client and machine.found is not None:
            return machine.found
    if machine.is_heard:
        raise QuicFailed("UDP gets through, but the peer began no QUIC.")
    raise QuicFailed("UDP does not get through between the two machines.")


async def _send_probe(sock: trio.socket.SocketType, send: Send) -> None:
    host, to = send.to[0], outgoing(sock.family, send.to)
    try:
        if send.opening:
            usual = get_hops(sock, host)
            set_hops(sock, host, OPENING_TTL)
            try:
                await sock.sendto(send.data, to)
            finally:
                set_hops(sock, host, usual)
        else:
            await sock.sendto(send.data, to)
    except OSError:
        # One target cannot be reached from here; the others may.
        return

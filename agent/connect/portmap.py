"""Keeps one port mapping of the data port at the router: PCP, else NAT-PMP, else UPnP. Nothing ever waits for it."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from agent.connect import igd, port_control
from agent.connect.network import Network
from agent.connect.port_control import Granted
from protocol.candidates import PORTMAP, Candidate
from protocol.errors import ProtocolError

_TRIES = (0.25, 0.5, 1.0)
# No router that maps ports is asked again after this, or when the network has changed (seconds).
AGAIN = 600.0
GOODBYE = 1.0

T = TypeVar("T")


def default_gateway(routes: Path = Path("/proc/net/route")) -> str | None:
    """The IPv4 default gateway (Linux); None where there is none or the system does not tell."""
    try:
        lines = routes.read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        # Up and a gateway: RTF_UP | RTF_GATEWAY.
        if len(fields) > 3 and fields[1] == "00000000" and int(fields[3], 16) & 3 == 3:
            return str(ipaddress.IPv4Address(struct.pack("=I", int(fields[2], 16))))
    return None


class PortMapping:
    """One for each agent. ``gateway`` finds the router. `run` keeps a mapping until cancelled, then gives it back."""

    def __init__(self, network: Network, gateway: Callable[[], str | None] = default_gateway) -> None:
        self._network = network
        self._gateway = gateway
        self._nonce = os.urandom(12)
        self._protocol = ""
        self.sentence = "No port mapping was asked for yet."

    async def run(self) -> None:
        """Ask, renew at half-life, ask again when the network has changed."""
        granted: Granted | None = None
        gateway: str | None = None
        try:
            while True:
                changed = self._network.changed
                gateway = await trio.to_thread.run_sync(self._gateway)
                granted = await self._ask(gateway, port_control.LIFE)
                self._network.take_mappings(self._candidates(granted))
                with trio.move_on_after(AGAIN if granted is None else granted.life / 2):
                    await changed.wait()
        finally:
            self._network.take_mappings([])
            if granted is not None:
                with trio.move_on_after(GOODBYE, shield=True):
                    await self._ask(gateway, 0)

    def _candidates(self, granted: Granted | None) -> list[Candidate]:
        if granted is None:
            return []
        problem = port_control.outside_problem(granted.address, self._network.observed)
        if problem:
            self.sentence = problem
            return []
        self.sentence = f"The router maps port {granted.port} of {granted.address} to this machine ({self._protocol})."
        return [Candidate(kind=PORTMAP, host=granted.address, port=granted.port)]

    async def _ask(self, gateway: str | None, life: int) -> Granted | None:
        """A mapping for ``life`` seconds; 0 gives it back. None when there is none."""
        port = self._network.data_port
        if gateway is None or port is None or socket.AF_INET not in port.families:
            self.sentence = "There is no router to ask for a port mapping."
            return None
        reasons = []
        for name, way in (("PCP", self._pcp), ("NAT-PMP", self._nat_pmp), ("UPnP", self._upnp)):
            if life == 0 and name != self._protocol:
                continue
            try:
                granted = await way(gateway, port.port, life)
            except ProtocolError as error:
                reasons.append(f"{name}: {error.sentence}")
            except OSError as error:
                reasons.append(f"{name}: {error.strerror or error}.")
            else:
                self._protocol = name
                return granted
        self.sentence = "The router maps no port. " + " ".join(reasons)
        return None

    # --- PCP and NAT-PMP -----------------------------------------------------------------------------------

    async def _pcp(self, gateway: str, port: int, life: int) -> Granted:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((gateway, port_control.PORT))
            request = port_control.pcp_request(sock.getsockname()[0], self._nonce, port, port, life)
            return await _exchange(
                sock, request, lambda data: port_control.parse_pcp_untrusted(data, self._nonce, port)
            )

    async def _nat_pmp(self, gateway: str, port: int, life: int) -> Granted:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((gateway, port_control.PORT))
            address = await _exchange(sock, port_control.address_request(), port_control.parse_address_untrusted)
            request = port_control.map_request(port, port if life else 0, life)
            granted = await _exchange(sock, request, lambda data: port_control.parse_map_untrusted(data, port))
        return Granted(address, granted.port, granted.life, granted.epoch)

    # --- UPnP ----------------------------------------------------------------------------------------------

    async def _upnp(self, gateway: str, port: int, life: int) -> Granted:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((gateway, igd.SEARCH_PORT))
            own = str(sock.getsockname()[0])
            place = await _exchange(sock, igd.search_request(), lambda data: igd.parse_search_untrusted(data, gateway))
        # Loaded only where a router speaks UPnP: an HTTP client takes a tenth of a daemon's start.
        from agent.connect.igd_client import map_port

        return await map_port(place, gateway, own, port, life)


async def _exchange(sock: trio.socket.SocketType, request: bytes, parse: Callable[[bytes], T]) -> T:
    """Ask until there is an answer that can be read. Raises what ``parse`` raises, `ProtocolError` for silence."""
    for wait in _TRIES:
        await sock.send(request)
        with trio.move_on_after(wait):
            return parse(await sock.recv(port_control.MAX_MESSAGE + 1))
    raise ProtocolError("The router does not answer.")

"""Where a request really comes from, when reverse proxies stand in front of the relay.

A proxy adds the address it was called from at the right end of ``X-Forwarded-For`` or ``Forwarded`` (RFC 7239); what
stands further left came with the call and may be anything. So the list is read from the right, only as long as those
who say it are proxies of the operator's own, and only in the one header that they are set up to write: the other one
they pass on as their caller wrote it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from protocol.places import neighbourhood

if TYPE_CHECKING:
    # The operator's commands read settings and need no web framework.
    from starlette.types import ASGIApp, Receive, Scope, Send

Header = Literal["x-forwarded-for", "forwarded"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# What is looked at of such a header, from the right: proxies in a row, and characters in all.
MAX_HOPS = 16
MAX_LENGTH = 4096


def network_of(text: str) -> Network:
    """An address or a network such as ``10.0.0.0/8``. Raises ValueError."""
    return ipaddress.ip_network(text)


class Proxies:
    """The operator's own reverse proxies, as addresses and networks. Raises ValueError for what is neither."""

    def __init__(self, proxies: Iterable[str] = (), header: Header = "x-forwarded-for") -> None:
        self._networks = [network_of(text) for text in proxies]
        self.header: Header = header

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._networks)

    def trusts(self, address: str) -> bool:
        """Whether this is one of them."""
        parsed = _address_untrusted(address)
        return parsed is not None and self._has(parsed)

    def caller_at(self, stream: Any) -> str:
        """As whom limits count who opened a connection; empty for a proxy's, behind which may be anybody, and where
        there is no address."""
        while (sock := getattr(stream, "socket", None)) is None:
            stream = getattr(stream, "transport_stream", None)
            if stream is None:
                return ""
        try:
            name = sock.getpeername()
        except OSError:
            return ""
        return "" if not isinstance(name, tuple) or self.trusts(name[0]) else neighbourhood(name[0])

    def origin_untrusted(self, peer: str, values: Sequence[str]) -> str | None:
        """Who called, by who the connection comes from and the header's values in their order.

        ``peer`` itself when it is no proxy; None when the proxies do not say it in a way that can be understood, or
        when all that they name are proxies.
        """
        if not self.trusts(peer):
            return peer
        text = ",".join(values)
        # A list that is cut at the left begins with half of something, which is not looked at.
        hops = text[-MAX_LENGTH:].split(",")[1 if len(text) > MAX_LENGTH else 0 :]
        for hop in reversed(hops[-MAX_HOPS:]):
            address = _address_untrusted(_for_of_untrusted(hop) if self.header == "forwarded" else hop.strip())
            if address is None:
                return None
            if not self._has(address):
                return str(address)
        return None

    def _has(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def _for_of_untrusted(element: str) -> str:
    """What ``for`` is in one element of ``Forwarded``; empty when it does not say."""
    found = ""
    for pair in element.split(";"):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "for":
            if found:
                # Twice: whichever is meant, it may be the wrong one.
                return ""
            found = value.strip()
    return found[1:-1] if len(found) > 1 and found[0] == found[-1] == '"' else found


def _address_untrusted(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address with or without port, brackets and zone."""
    if len(text) > 64:
        return None
    host = text
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port)):
            return None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_port(text: str) -> bool:
    return text.startswith(":") and text[1:].isascii() and text[1:].isdigit() and len(text) <= 6


class OriginMiddleware:
    """ASGI middleware: ``client`` of a request is who called the operator's proxy. Outermost, so that limits, the audit
    log and what people are shown all see the same. Where a proxy does not say it, ``client`` stays the proxy."""

    def __init__(self, app: ASGIApp, *, proxies: Proxies) -> None:
        self._app = app
        self._proxies = proxies
        self._name = proxies.header.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = scope.get("client")
        if scope["type"] == "http" and peer and self._proxies.trusts(peer[0]):
            values = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == self._name]
            origin = self._proxies.origin_untrusted(peer[0], values)
            if origin is not None:
                scope = dict(scope, client=(origin, 0))
        await self._app(scope, receive, send)

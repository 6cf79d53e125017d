"""Requests that the relay itself makes to addresses named in its configuration or by other servers.

Such an address may lead where it should not (SSRF): to this machine, its neighbours or a cloud's metadata service. So
names are resolved here, every address is looked at, and the connection goes to an address that was looked at; TLS is
checked for the name. Only https, no redirects, bounded answers.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore
import trio

from protocol.errors import RetryLater

TIMEOUT = 10.0
MAX_ANSWER = 1 << 20
# NAT64 prefixes lead to any IPv4 address (RFC 6052, RFC 8215).
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


class OutboundFailed(RetryLater):
    """The other server did not answer, or not as it should; the sentence says what is wrong."""

    default_code = "OUTBOUND_FAILED"


@dataclass(frozen=True)
class Answer:
    """Status and body of an answer."""

    status: int
    body: bytes


def is_public_address(text: str) -> bool:
    """Whether an address is one of the public Internet, in whatever notation it hides another one."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public_address(str(address.ipv4_mapped))
        if address.sixtofour is not None or address.teredo is not None or any(address in net for net in _NAT64):
            return False
    return address.is_global and not address.is_multicast


class Outbound:
    """Makes requests. ``private`` allows addresses that are not public; ``ca_file`` trusts one authority alone."""

    def __init__(self, *, private: bool = False, ca_file: str | None = None) -> None:
        self._backend = _CheckedBackend(private)
        self._ca_file = ca_file

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One request and its whole answer. Raises `OutboundFailed`; cancellation closes the connection."""
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise OutboundFailed(f"{url[:200]!r} is not an https address.")
        context = ssl.create_default_context(cafile=self._ca_file)
        sent = [("Accept", "application/json"), ("Host", parts.netloc), *(headers or {}).items()]
        try:
            with trio.fail_after(TIMEOUT):
                async with (
                    httpcore.AsyncConnectionPool(ssl_context=context, network_backend=self._backend) as pool,
                    pool.stream(method, url, headers=sent, content=body) as response,
                ):
                    return Answer(response.status, await _body(response, parts.hostname))
        except trio.TooSlowError as error:
            raise OutboundFailed(f"{parts.hostname} did not answer within {TIMEOUT:.0f} seconds.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise OutboundFailed(f"{parts.hostname} cannot be reached: {error}.") from error


async def _body(response: httpcore.Response, host: str) -> bytes:
    received = bytearray()
    # Cancelling ends the library's generators from the innermost outwards; leaving the loop would leave them behind.
    with trio.CancelScope() as enough:
        async for chunk in response.aiter_stream():
            received += chunk
            if len(received) > MAX_ANSWER:
                received.clear()
                enough.cancel()
    if enough.cancel_called:
        raise OutboundFailed(f"{host} answers with more than {MAX_ANSWER} bytes.")
    return bytes(received)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were looked at, never to a name."""

    def __init__(self, private: bool) -> None:
        self._private = private
        self._inner = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the interface of httpcore
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} has no address") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._private and not all(is_public_address(address) for address in addresses):
            # One bad address is enough: the answer may be another one next time.
            raise httpcore.ConnectError(f"{host} leads to an address that is not public")
        failure: httpcore.ConnectError | None = None
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                failure = error
        raise failure or httpcore.ConnectError(f"{host} has no address")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("only TCP is used")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

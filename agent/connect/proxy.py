"""The way to the relay through an HTTP proxy (CONNECT, RFC 9110 section 9.3.6), with basic authentication (RFC 7617).

The proxy comes from the agent's configuration (``relay.proxy``) or from ``HTTPS_PROXY`` and ``NO_PROXY``. Only the
relay is reached this way: the link and the tunnel; other agents never are. What the proxy answers is bounded and
checked; what flows afterwards is TLS with the relay, whose channel binding notices a proxy that opens it.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import trio

from protocol.errors import NeedsPerson, RetryLater, TowpathError

MAX_ANSWER = 16 * 1024
ANSWER_TIMEOUT = 20.0
DEFAULT_PORT = 80


class ProxyUnusable(NeedsPerson):
    """The proxy is described in a way that cannot be used, or refuses what this agent needs."""

    default_code = "PROXY_REFUSED"


class ProxyFailed(RetryLater):
    """The proxy cannot be reached or cannot reach the relay now."""

    default_code = "PROXY_FAILED"


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy. ``authorization`` is the header's value, kept out of every text about it."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_proxy(url: str) -> Proxy:
    """A proxy from ``http://[user:password@]host[:port]`` or ``host:port``. Raises `ProxyUnusable`; the sentence does
    not repeat a password."""
    text = url.strip()
    try:
        parts = urlsplit(text if "//" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ProxyUnusable("The address of the proxy is malformed.", who="you") from error
    if parts.scheme.lower() != "http":
        raise ProxyUnusable(
            f"A proxy of the kind {parts.scheme[:16]}:// is not supported; name an HTTP proxy as "
            "http://proxy.example.org:3128.",
            who="you",
        )
    if not host:
        raise ProxyUnusable("The address of the proxy names no host.", who="you")
    authorization = ""
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(credentials.encode()).decode()
    return Proxy(host, port or DEFAULT_PORT, authorization)


def choose_proxy(configured: str | None, host: str, port: int, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy for connections to this host; None for none. ``configured`` counts before the environment, and
    ``none`` there means that the environment does not count either. Raises `ProxyUnusable`."""
    if configured is not None:
        return None if configured == "none" else parse_proxy(configured)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        if url := environment.get(name, "").strip():
            exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
            return None if is_exempt(host, port, exceptions) else parse_proxy(url)
    return None


def is_exempt(host: str, port: int, exceptions: str) -> bool:
    """Whether ``NO_PROXY`` names this host: exactly, by a domain it lies in, by network, with or without a port."""
    name = host.lower().rstrip(".").strip("[]")
    address = _address(name)
    for entry in exceptions.replace(",", " ").lower().split():
        if entry == "*":
            return True
        pattern, wanted = _split_port(entry)
        if wanted is not None and wanted != port:
            continue
        if address is not None:
            try:
                if address in ipaddress.ip_network(pattern, strict=False):
                    return True
            except ValueError:
                continue
        else:
            domain = pattern.removeprefix("*").lstrip(".").rstrip(".")
            if domain and (name == domain or name.endswith("." + domain)):
                return True
    return False


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _split_port(entry: str) -> tuple[str, int | None]:
    if entry.startswith("["):
        inside, _, rest = entry[1:].partition("]")
        number = rest.removeprefix(":")
        return inside, int(number) if number.isdigit() else None
    pattern, colon, number = entry.rpartition(":")
    if colon and number.isdigit() and ":" not in pattern:
        return pattern, int(number)
    return entry, None


class Dialer:
    """Opens plain streams to the relay, directly or through a proxy. `dial` fits the link and the tunnel."""

    def __init__(self, configured: str | None, environment: Mapping[str, str]) -> None:
        self._configured = configured
        self._environment = dict(environment)

    def proxy_for(self, host: str, port: int) -> Proxy | None:
        """Which proxy is used. Raises `ProxyUnusable`."""
        return choose_proxy(self._configured, host, port, self._environment)

    async def dial(self, host: str, port: int) -> trio.SocketStream:
        """A stream to the host. Raises OSError (direct) or `TowpathError` (proxy)."""
        proxy = self.proxy_for(host, port)
        if proxy is None:
            return await trio.open_tcp_stream(host, port)
        return await connect_through(proxy, host, port)


async def connect_through(proxy: Proxy, host: str, port: int) -> trio.SocketStream:
    """Have the proxy connect to a host. Raises `ProxyFailed` and `ProxyUnusable`."""
    try:
        stream = await trio.open_tcp_stream(proxy.host, proxy.port)
    except OSError as error:
        raise ProxyFailed(f"The proxy {proxy} cannot be reached: {error}.", who="you") from error
    try:
        with trio.move_on_after(ANSWER_TIMEOUT) as scope:
            await stream.send_all(_request(proxy, host, port))
            check_answer_untrusted(await _head(stream, proxy), proxy, host, port)
        if scope.cancelled_caught:
            raise ProxyFailed(f"The proxy {proxy} did not answer within {ANSWER_TIMEOUT:g} seconds.")
    except (trio.BrokenResourceError, OSError) as error:
        await trio.aclose_forcefully(stream)
        raise ProxyFailed(f"The connection to the proxy {proxy} broke.") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


def _request(proxy: Proxy, host: str, port: int) -> bytes:
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}", "User-Agent: towpath-agent"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


async def _head(stream: trio.SocketStream, proxy: Proxy) -> bytes:
    data = bytearray()
    while b"\r\n\r\n" not in data:
        if len(data) > MAX_ANSWER:
            raise ProxyFailed(f"The answer of the proxy {proxy} is too long.")
        more = await stream.receive_some(4096)
        if not more:
            raise ProxyFailed(f"The proxy {proxy} closed the connection without an answer.")
        data += more
    return bytes(data)


def check_answer_untrusted(answer: bytes, proxy: Proxy, host: str, port: int) -> None:
    """Return when the proxy's answer (up to and with its empty line) says that the way is open. Raises `TowpathError`.

    A relay never speaks first, so bytes behind the answer of a proxy that connected are not the relay's.
    """
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = _status(head.split(b"\r\n", 1)[0])
    if status is None:
        raise ProxyUnusable(f"What answers at {proxy} is no HTTP proxy. Check the proxy's address.", who="you")
    if 200 <= status <= 299:
        if rest:
            raise ProxyUnusable(f"The proxy {proxy} puts words of its own into connections.", who="you")
        return
    raise _refusal(status, proxy, host, port)


def _status(line: bytes) -> int | None:
    parts = line.split(b" ", 2)
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or len(parts[1]) != 3 or not parts[1].isdigit():
        return None
    return int(parts[1])


def _refusal(status: int, proxy: Proxy, host: str, port: int) -> TowpathError:
    if status == 407:
        what = "did not accept" if proxy.authorization else "asks for"
        return ProxyUnusable(
            f"The proxy {proxy} {what} a user name and a password; put the right ones into `relay.proxy` "
            "(http://user:password@host:port).",
            code="PROXY_AUTHENTICATION",
            who="you",
        )
    if status in (403, 405):
        return ProxyUnusable(
            f"The proxy {proxy} does not allow connections to the relay {host}:{port}; ask its operator to.", who="you"
        )
    return ProxyFailed(f"The proxy {proxy} could not connect to the relay {host}:{port} (status {status}).")

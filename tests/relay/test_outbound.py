"""What the relay fetches, from servers that mean it harm: real TLS on this machine, and names that lead elsewhere."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from relay.auth import outbound
from relay.auth.outbound import MAX_ANSWER, Outbound, OutboundFailed
from relay.auth.upstream import NotWelcome, Upstream
from relay.settings import Provider

LINK_LOCAL = "169.254.169.254"
Part = bytes | float


@asynccontextmanager
async def hostile(tmp_path: Path, answer: Callable[[str], list[Part]], name: str = "localhost") -> AsyncIterator[Any]:
    """A server that sends bytes and, for each number among them, waits so many seconds. Yields its address, the
    authority of its certificate, and the paths that were asked for."""
    authority = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    asked: list[str] = []

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            request = bytes(await stream.receive_some(65536))
            if not request:
                return
            path = request.split(b" ")[1].decode()
            asked.append(path)
            for part in answer(path):
                if isinstance(part, bytes):
                    await stream.send_all(part)
                else:
                    await trio.sleep(part)
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_ssl_over_tcp, serve, 0, context, host="127.0.0.1", https_compatible=True)
        )
        yield f"https://localhost:{listeners[0].transport_listener.socket.getsockname()[1]}", str(ca_file), asked
        nursery.cancel_scope.cancel()


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


HARM: dict[str, tuple[list[Part], str]] = {
    "too much": ([ok(b"x" * (MAX_ANSWER + 1))], "more than"),
    "too much in pieces": (
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 40],
        "more than",
    ),
    "headers without end": ([b"HTTP/1.1 200 OK\r\n", *[b"X: " + b"y" * 8000 + b"\r\n"] * 200], "cannot be reached"),
    "a drip": ([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", *[b"x", 0.05] * 100], "within"),
    "silence": ([60.0], "within"),
    "less than promised": ([b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx"], "cannot be reached"),
    "no HTTP": ([b"\x00" * 500], "cannot be reached"),
}


@pytest.mark.parametrize("what", HARM)
async def test_a_hostile_answer_ends_in_words(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, sentence = HARM[what]
    monkeypatch.setattr(outbound, "TIMEOUT", 0.5)
    async with hostile(tmp_path, lambda _path: parts) as (url, ca_file, _):
        with pytest.raises(OutboundFailed, match=sentence):
            await Outbound(private=True, ca_file=ca_file).request("GET", url)


async def test_a_redirect_is_an_answer_and_not_followed(tmp_path: Path) -> None:
    places = [f"http://{LINK_LOCAL}/latest/meta-data/", "/elsewhere"]
    for place in places:
        head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + place.encode() + b"\r\n\r\n"
        async with hostile(tmp_path, lambda _path, head=head: [head]) as (url, ca_file, asked):  # type: ignore[misc]
            answer = await Outbound(private=True, ca_file=ca_file).request("GET", url)
            assert (answer.status, len(asked)) == (302, 1)


async def test_a_certificate_counts_for_its_own_name_and_authority(tmp_path: Path) -> None:
    async with hostile(tmp_path, lambda _path: [ok(b"{}")], name="other.example") as (url, ca_file, asked):
        for authority in (ca_file, None):
            with pytest.raises(OutboundFailed, match="cannot be reached"):
                await Outbound(private=True, ca_file=authority).request("GET", url)
        assert asked == []


class _Names(trio.abc.HostnameResolver):
    """Names that lead where a test says."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def getaddrinfo(self, host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self._addresses]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise OSError


@pytest.mark.parametrize("addresses", [(LINK_LOCAL,), ("1.1.1.1", LINK_LOCAL), ("10.0.0.1", "1.1.1.1")])
async def test_a_name_that_leads_inside_is_not_asked(addresses: tuple[str, ...]) -> None:
    trio.socket.set_custom_hostname_resolver(_Names(*addresses))
    with pytest.raises(OutboundFailed, match="not public"):
        await Outbound().request("GET", "https://rebound.example/")


@pytest.mark.parametrize("place", ["token_endpoint", "jwks_uri", "userinfo_endpoint"])
async def test_a_provider_cannot_send_the_relay_inside(place: str, tmp_path: Path) -> None:
    """What it names is looked at like its own address; its own is allowed here so that it can be asked at all."""
    inside = f"https://{LINK_LOCAL}/latest/meta-data/"
    own: list[str] = []

    def answer(path: str) -> list[Part]:
        issuer = own[0]
        document = {"issuer": issuer, "authorization_endpoint": f"{issuer}/a", "token_endpoint": f"{issuer}/t"}
        document |= {"jwks_uri": f"{issuer}/k", "userinfo_endpoint": f"{issuer}/u", place: inside}
        return [ok(json.dumps(document).encode())]

    class Gate:
        """Lets the provider's own address pass, as one on the Internet would."""

        def __init__(self, ca_file: str) -> None:
            self.own, self.others = Outbound(private=True, ca_file=ca_file), Outbound()
            self.refused: list[str] = []

        async def request(self, method: str, url: str, **more: Any) -> Any:
            if url.startswith(own[0]):
                return await self.own.request(method, url, **more)
            try:
                return await self.others.request(method, url, **more)
            except OutboundFailed as error:
                self.refused.append(error.sentence)
                raise

    async with hostile(tmp_path, answer) as (issuer, ca_file, _):
        own.append(issuer)
        provider = Provider(id="p", name="P", issuer=issuer, client_id="me", domains=["p.example"])
        gate = Gate(ca_file)
        upstream = Upstream(provider, tmp_path, lambda: 0.0, gate)
        with pytest.raises((OutboundFailed, NotWelcome)):
            if place == "token_endpoint":
                await upstream.claims("code", "https://r/x", nonce="n", verifier="v" * 43)
            elif place == "jwks_uri":
                await upstream._key(None)
            else:
                await upstream._with_userinfo(inside, "t", {"sub": "s"})
        assert len(gate.refused) == 1
        assert "not public" in gate.refused[0]

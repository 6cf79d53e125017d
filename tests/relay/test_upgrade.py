"""Web requests and agents inside WebSocket on one port: told apart by the first line, with nothing lost and bounded."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from protocol.places import Places
from protocol.websocket.core import Core
from protocol.websocket.paths import LINK_PATH, TUNNEL_PATH
from relay.upgrade import Upgrade


class Secured:
    """What the upgrade asks of a TLS stream, on a stream in memory."""

    def __init__(self, stream: trio.abc.Stream, alpn: str | None = "http/1.1") -> None:
        self.transport_stream = stream
        self._alpn = alpn
        self.receive_some = stream.receive_some
        self.send_all = stream.send_all
        self.aclose = stream.aclose

    def selected_alpn_protocol(self) -> str | None:
        return self._alpn

    async def __aenter__(self) -> Secured:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class Served:
    """Handlers that note what they were given."""

    def __init__(self) -> None:
        self.web = b""
        self.opened: list[str] = []

    async def serve(self, stream: Any) -> None:
        while data := await stream.receive_some(7):
            self.web += bytes(data)

    async def link(self, stream: Any) -> None:
        self.opened.append("link")

    async def tunnel(self, stream: Any) -> None:
        self.opened.append("tunnel")

    def upgrade(self, **options: Any) -> Upgrade:
        return Upgrade(self.serve, self.link, self.tunnel, **options)


@given(
    st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6)
    | st.just([b"GET /towpath/v1/", b"websockets HTTP/1.1\r\n\r\n", b"GET /"])
)
def test_everybody_else_reaches_the_web_server_with_nothing_missing(parts: list[bytes]) -> None:
    async def run() -> None:
        served = Served()
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.upgrade().serve, Secured(theirs))
            for part in parts:
                await ours.send_all(part)
                await trio.testing.wait_all_tasks_blocked()
            await ours.send_eof()
        assert served.web == b"".join(parts)
        assert not served.opened

    trio.run(run)


@pytest.mark.parametrize(
    ("path", "opened"), [(LINK_PATH, ["link"]), (TUNNEL_PATH, ["tunnel"]), ("/towpath/v1/websocket/x", [])]
)
async def test_agents_reach_theirs(path: str, opened: list[str]) -> None:
    served = Served()
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.upgrade().serve, Secured(theirs))
        request = Core.client("relay", 443, path, 0).take()
        for start in range(0, len(request), 11):
            await ours.send_all(request[start : start + 11])
        answer = await ours.receive_some()
        assert answer.startswith(b"HTTP/1.1 101" if opened else b"HTTP/1.1 404")
        await ours.aclose()
    assert served.opened == opened
    assert not served.web


async def test_callers_that_say_nothing_are_bounded_in_number_and_time(autojump_clock: trio.testing.MockClock) -> None:
    served = Served()
    upgrade = served.upgrade(places=Places(2))
    async with trio.open_nursery() as nursery:
        ends = []
        for _ in range(3):
            ours, theirs = trio.testing.memory_stream_pair()
            ends.append(ours)
            nursery.start_soon(upgrade.serve, Secured(theirs))
            await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        assert await ends[2].receive_some() == b""
        assert trio.current_time() == began
        assert await ends[0].receive_some() == b""
        assert trio.current_time() - began == pytest.approx(75)

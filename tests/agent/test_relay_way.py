"""How connections to the relay are wrapped: which of the two ways is tried when, what is remembered, and the real thing
behind a firewall that inspects."""

from __future__ import annotations

import errno
import json
import socket
import ssl

import pytest
import trio
import trio.testing
import trustme

from agent.connect.link_connection import LinkConnector
from agent.connect.relay_way import DOUBTS, HEAD_START, REMEMBERED, Blocked, CannotConnect, RelayWay
from agent.connect.transport import Wish
from agent.connect.tunnel import TunnelFailed, TunnelTransport
from protocol.candidates import RELAY_TUNNEL, Candidate, PathGo
from protocol.interception import CODE
from protocol.websocket.carrier import Carrier
from relay.dispatch import Dispatcher
from relay.rendezvous.registry import Registry
from relay.upgrade import Upgrade
from tests.agent.inspecting_firewall import HTTP, firewall
from tests.relay.tunnel_world import CA as TUNNEL_CA
from tests.relay.tunnel_world import SESSION, USER, dial, tunnel_world
from tests.system.test_link_end_to_end import CA, accept, make_link, server_context, web

RAW, WEBSOCKET = "raw", "websocket"
WISH = Wish(session_id=SESSION, task_id=SESSION, kind="control")


class Ways:
    """Two ways that do as they are told; ``tried`` says what was tried when."""

    def __init__(self, **does: object) -> None:
        self.does = does
        self.tried: list[tuple[str, float]] = []
        self.dropped: list[str] = []

    async def go(self, name: str) -> str:
        self.tried.append((name, trio.current_time()))
        does = self.does[name]
        if isinstance(does, BaseException):
            raise does
        await trio.sleep(does)  # type: ignore[arg-type]
        return name

    async def first(self, way: RelayWay) -> tuple[str, str]:
        return await way.first(lambda: self.go(RAW), lambda: self.go(WEBSOCKET), self.dropped.append)


def a_way(transport: str = "auto", network: object = "home") -> RelayWay:
    return RelayWay(transport, lambda: network, trio.current_time)


async def test_raw_has_a_head_start_and_wins(autojump_clock: trio.testing.MockClock) -> None:
    way, ways = a_way(), Ways(raw=HEAD_START - 0.1, websocket=0)
    assert await ways.first(way) == (RAW, RAW)
    assert [name for name, _ in ways.tried] == [RAW]
    assert way.known == RAW


async def test_websocket_is_tried_at_once_when_raw_is_broken_off(autojump_clock: trio.testing.MockClock) -> None:
    way, ways = a_way(), Ways(raw=Blocked("cut"), websocket=1)
    began = trio.current_time()
    assert await ways.first(way) == (WEBSOCKET, WEBSOCKET)
    assert trio.current_time() - began == pytest.approx(1)
    # And then without raw, for an hour.
    ways.tried.clear()
    await ways.first(way)
    assert [name for name, _ in ways.tried] == [WEBSOCKET]
    await trio.sleep(REMEMBERED)
    await ways.first(way)
    assert [name for name, _ in ways.tried] == [WEBSOCKET, RAW, WEBSOCKET]


async def test_websocket_is_tried_beside_raw_that_comes_to_nothing(autojump_clock: trio.testing.MockClock) -> None:
    way, ways = a_way(), Ways(raw=1000, websocket=1)
    began = trio.current_time()
    assert await ways.first(way) == (WEBSOCKET, WEBSOCKET)
    assert trio.current_time() - began == pytest.approx(HEAD_START + 1)


async def test_what_is_no_matter_of_wrapping_is_not_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    way, ways = a_way(), Ways(raw=CannotConnect("no route"), websocket=0)
    with pytest.raises(CannotConnect, match="no route"):
        await ways.first(way)
    assert [name for name, _ in ways.tried] == [RAW]


async def test_when_neither_passes_the_reason_is_that_of_raw(autojump_clock: trio.testing.MockClock) -> None:
    way, ways = a_way(), Ways(raw=Blocked("raw cut"), websocket=Blocked("HTTP cut"))
    with pytest.raises(Blocked, match="raw cut"):
        await ways.first(way)
    assert way.known is None


async def test_a_relay_that_restarts_does_not_drive_its_agents_into_websocket(
    autojump_clock: trio.testing.MockClock,
) -> None:
    way, ways = a_way(), Ways(raw=0, websocket=0)
    await ways.first(way)
    # Slow, as when thousands come back; then broken off once, as by the relay's end.
    ways.does[RAW] = 20
    assert await ways.first(way) == (RAW, RAW)
    ways.does[RAW] = Blocked("cut")
    for _ in range(DOUBTS):
        with pytest.raises(Blocked):
            await ways.first(way)
    assert [name for name, _ in ways.tried].count(WEBSOCKET) == 0
    # Where it is broken off again and again, the network may be another one.
    assert await ways.first(way) == (WEBSOCKET, WEBSOCKET)


async def test_without_descriptors_there_is_no_tunnel_and_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("agent.connect.tunnel.local_pair", no_more)
    near, far = socket.socketpair()
    near.setblocking(False)

    async def dial(_host: str, _port: int) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        return trio.SocketStream(trio.socket.from_stdlib_socket(near))

    with far:
        tunnel = TunnelTransport("https://relay:443", None, dial, RelayWay("websocket"), Carrier())
        place = Candidate(kind=RELAY_TUNNEL, host="relay", port=443, token="0")
        with pytest.raises(TunnelFailed):
            await tunnel.look(WISH, PathGo(session_id=SESSION, generation=1, start_in=0.0, tunnel=place))
        assert far.recv(1) == b""


async def test_another_network_is_another_matter(autojump_clock: trio.testing.MockClock) -> None:
    network = ["home"]
    way, ways = RelayWay("auto", lambda: tuple(network), trio.current_time), Ways(raw=Blocked("cut"), websocket=0)
    await ways.first(way)
    network[0] = "office"
    assert way.known is None


@pytest.mark.parametrize(("after", "kind"), [(1.0, Blocked), (20.0, CannotConnect)])
async def test_a_relay_that_is_too_busy_is_no_firewall(
    after: float, kind: type[CannotConnect], autojump_clock: trio.testing.MockClock
) -> None:
    async def dial_and_wait(host: str, port: int) -> trio.abc.HalfCloseableStream:
        ours, theirs = trio.testing.memory_stream_pair()

        async def cut() -> None:
            await trio.sleep(after)
            await theirs.aclose()

        nursery.start_soon(cut)
        return ours

    async with trio.open_nursery() as nursery:
        connector = LinkConnector("relay.example", 443, None, dial_and_wait, a_way("raw"))
        with pytest.raises(CannotConnect) as caught:
            await connector.open()
        assert type(caught.value) is kind


@pytest.mark.parametrize("transport", [RAW, WEBSOCKET])
async def test_the_configuration_decides(transport: str, autojump_clock: trio.testing.MockClock) -> None:
    ways = Ways(raw=Blocked("no"), websocket=Blocked("no"))
    with pytest.raises(Blocked):
        await ways.first(a_way(transport))
    assert [name for name, _ in ways.tried] == [transport]


# --- the real thing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True])
async def test_a_link_behind_a_firewall_that_passes_only_https(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.connect.relay_way.HEAD_START", 0.2)
    registry, way = Registry(), RelayWay()
    handler = accept(registry)
    dispatcher = Dispatcher(web=Upgrade(web, handler, None).serve, link=handler, tls_context=server_context())
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, dispatcher.handle, [listener])
        async with firewall(listener.socket.getsockname()[1], silent=silent) as wall:
            link = make_link(wall.port, way=way)
            nursery.start_soon(link.run)
            with trio.fail_after(10):
                await link.wait_connected()
                assert link.statistics().wrapping == WEBSOCKET
                while not registry.connected():
                    await trio.sleep(0.01)
                (node,) = registry.connected()
                answer = await registry.call(node, "GET", "/link/ls/x", query=[("limit", "20000")])
                assert len(json.loads(answer)["entries"]) == 20000
                link.kick()
                while wall.seen["http/1.1"] < 2:
                    await trio.sleep(0.01)
                await link.wait_connected()
            # Raw was tried once only.
            assert wall.seen == {"towpath-link/1": 1, "http/1.1": 2}
        nursery.cancel_scope.cancel()


async def test_a_trusted_authority_that_opens_the_connection_is_found_out() -> None:
    """The interceptor's certificate is trusted here, as on machines of companies; the relay's proof names its own."""
    registry = Registry()
    handler = accept(registry)
    dispatcher = Dispatcher(web=Upgrade(web, handler, None).serve, link=handler, tls_context=server_context())
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    company = trustme.CA()
    opened = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    company.issue_cert("localhost").configure_cert(opened)
    opened.set_alpn_protocols(["http/1.1"])
    onward = ssl.create_default_context(cadata=CA.cert_pem.bytes().decode())
    onward.set_alpn_protocols(["http/1.1"])

    async def intercept(stream: trio.SocketStream) -> None:
        inside = trio.SSLStream(stream, opened, server_side=True, https_compatible=True)
        raw = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        far = trio.SSLStream(raw, onward, server_hostname="localhost", https_compatible=True)

        async def copy(source: trio.abc.ReceiveStream, target: trio.abc.SendStream) -> None:
            try:
                while data := await source.receive_some(65536):
                    await target.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            nursery.cancel_scope.cancel()

        async with stream, raw, trio.open_nursery() as nursery:
            nursery.start_soon(copy, inside, far)
            nursery.start_soon(copy, far, inside)

    (bad,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as outer:
        outer.start_soon(trio.serve_listeners, dispatcher.handle, [listener])
        outer.start_soon(trio.serve_listeners, intercept, [bad])
        link = make_link(bad.socket.getsockname()[1], company, way=RelayWay())
        outer.start_soon(link.run)
        with trio.fail_after(10):
            while "intercepts" not in link.statistics().last_error:
                await trio.sleep(0.02)
        assert not registry.connected()
        outer.cancel_scope.cancel()


@pytest.mark.parametrize("passing", [HTTP, {"h2", "http/1.1"}])
async def test_a_tunnel_behind_a_firewall_that_passes_only_https(passing: set[str]) -> None:
    pem = TUNNEL_CA.cert_pem.bytes().decode()
    async with tunnel_world(websocket=1) as world, firewall(world.port, passing=passing) as wall:
        way = RelayWay()
        transport = TunnelTransport(f"https://localhost:{wall.port}", pem, dial, way, world.agents)
        tokens = world.service.issue(SESSION, USER)
        go = PathGo(session_id=SESSION, generation=1, start_in=0.0, tunnel=_place(tokens[0]))
        kinds: list[str] = []

        async def inside() -> None:
            connection = await transport.connect(None, go)  # type: ignore[arg-type]
            kinds.append(f"{connection.path.kind} {connection.path.transport}")
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection.sock))
            async with stream:
                await stream.send_all(b"from behind the wall")

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(inside)
                async with await world.enter(tokens[1]) as peer:
                    assert await peer.receive_some() == b"from behind the wall"
        assert kinds == ["tunnel websocket"]
        assert way.known == WEBSOCKET
        assert world.relay.statistics().carried == (1 if "http/1.0" in passing else 0)


@pytest.mark.parametrize("way", [RAW, WEBSOCKET])
async def test_a_tunnel_whose_certificate_is_another_ones_is_not_entered(way: str) -> None:
    """And that is what is said, not that something is in the way: another wrapping would mend nothing."""
    other = trustme.CA().cert_pem.bytes().decode()
    async with tunnel_world(websocket=1) as world:
        transport = TunnelTransport(f"https://localhost:{world.port}", other, dial, RelayWay(way), world.agents)
        token = world.service.issue(SESSION, USER)[0]
        go = PathGo(session_id=SESSION, generation=1, start_in=0.0, tunnel=_place(token))
        with trio.fail_after(20), pytest.raises(TunnelFailed, match="is not the expected one") as failed:
            await transport.connect(None, go)  # type: ignore[arg-type]
    assert failed.value.code == CODE


def _place(token: str) -> Candidate:
    return Candidate(kind=RELAY_TUNNEL, host="localhost", port=1, token=token)

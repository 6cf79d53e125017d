"""The way to the relay through an HTTP proxy: which one is used, what it may answer, and the link and tunnel in it."""

from __future__ import annotations

import ssl

import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st

from agent.connect.proxy import (
    Dialer,
    Proxy,
    ProxyFailed,
    ProxyUnusable,
    check_answer_untrusted,
    choose_proxy,
    connect_through,
    is_exempt,
    parse_proxy,
)
from agent.connect.tunnel import open_tunnel
from protocol.errors import TowpathError
from relay.rendezvous.registry import Registry
from tests.agent.proxy_server import ProxyServer, proxy_server
from tests.relay.tunnel_world import SESSION, USER, tunnel_world
from tests.system.test_link_end_to_end import make_link, relay

HERE = Proxy("proxy.example", 3128)


@pytest.mark.parametrize(
    ("exceptions", "host", "exempt"),
    [
        ("", "relay.example.org", False),
        ("*", "relay.example.org", True),
        ("relay.example.org", "relay.example.org", True),
        ("relay.example.org", "Relay.Example.ORG.", True),
        ("example.org", "relay.example.org", True),
        (".example.org", "relay.example.org", True),
        ("*.example.org", "relay.example.org", True),
        ("ample.org", "relay.example.org", False),
        ("other.net, example.org", "relay.example.org", True),
        ("example.org:443", "relay.example.org", True),
        ("example.org:8443", "relay.example.org", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.1.2.3:443", "10.1.2.3", True),
        ("fd00::/8", "fd00::1", True),
        ("[fd00::1]:443", "fd00::1", True),
        ("10.0.0.0/8", "relay.example.org", False),
    ],
)
def test_no_proxy(exceptions: str, host: str, exempt: bool) -> None:
    assert is_exempt(host, 443, exceptions) is exempt


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_proxy_of_any_form_is_understood_or_ignored(exceptions: str, host: str) -> None:
    assert is_exempt(host, 443, exceptions) in (True, False)


def test_the_configuration_counts_before_the_environment() -> None:
    environment = {"HTTPS_PROXY": "http://env:1", "NO_PROXY": "inside.org"}
    assert str(choose_proxy(None, "relay.org", 443, environment)) == "env:1"
    assert choose_proxy(None, "relay.inside.org", 443, environment) is None
    assert str(choose_proxy("http://own:2", "relay.inside.org", 443, environment)) == "own:2"
    assert choose_proxy("none", "relay.org", 443, environment) is None
    assert choose_proxy(None, "relay.org", 443, {}) is None
    assert str(choose_proxy(None, "relay.org", 443, {"all_proxy": "plain:8080"})) == "plain:8080"


def test_passwords_are_decoded_and_never_shown() -> None:
    proxy = parse_proxy("http://us%40er:p%3Ass@proxy:3128")
    assert proxy.authorization == "Basic dXNAZXI6cDpzcw=="
    assert "dXNAZXI6cDpzcw" not in repr(proxy) + str(proxy)
    for url in ("socks5://secret@proxy:1", "https://a:secret@proxy", "http://a:secret@", "http://a:secret@x:99999"):
        with pytest.raises(ProxyUnusable) as caught:
            parse_proxy(url)
        assert "secret" not in caught.value.sentence


@given(st.binary(max_size=300) | st.builds(lambda n, b: b"HTTP/1.1 %d x\r\n\r\n" % n + b, st.integers(), st.binary()))
def test_any_answer_of_a_proxy_opens_the_way_or_is_an_error_with_a_sentence(answer: bytes) -> None:
    try:
        check_answer_untrusted(answer, HERE, "relay.org", 443)
    except TowpathError as error:
        assert error.sentence.endswith(".") or error.sentence.endswith(").")
        return
    assert answer.startswith(b"HTTP/1.")
    assert answer[9:10] == b"2"
    assert answer.endswith(b"\r\n\r\n") or b"\r\n\r\n" not in answer


@pytest.mark.parametrize(
    ("answer", "kind", "word"),
    [
        (b"HTTP/1.1 407 x\r\n\r\n", ProxyUnusable, "password"),
        (b"HTTP/1.1 403 x\r\n\r\n", ProxyUnusable, "allow"),
        (b"HTTP/1.1 503 x\r\n\r\n", ProxyFailed, "503"),
        (b"HTTP/1.1 200 x\r\n\r\nSSH-2.0", ProxyUnusable, "words of its own"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ProxyUnusable, "no HTTP proxy"),
        (b"HTTP/1.1 200 " + b"x" * 30_000, ProxyFailed, "too long"),
    ],
)
async def test_what_a_proxy_may_answer(answer: bytes, kind: type[TowpathError], word: str) -> None:
    async with proxy_server(answer=answer) as server:
        with trio.fail_after(10), pytest.raises(kind, match=word):
            await connect_through(Proxy("127.0.0.1", server.port), "relay.org", 443)


async def test_a_proxy_that_is_not_there() -> None:
    with pytest.raises(ProxyFailed, match="cannot be reached"):
        await connect_through(Proxy("127.0.0.1", 1), "relay.org", 443)


def dialer(server: ProxyServer, credentials: str = "") -> Dialer:
    at = f"{credentials}@" if credentials else ""
    return Dialer(f"http://{at}127.0.0.1:{server.port}", {})


async def test_the_link_goes_through_the_proxy_with_its_password() -> None:
    registry = Registry()
    async with relay(registry) as port, proxy_server(credentials="agent:word") as server:
        for credentials, works in (("", False), ("agent:wrong", False), ("agent:word", True)):
            link = make_link(port, dial=dialer(server, credentials).dial)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(link.run)
                with trio.fail_after(10):
                    if works:
                        await link.wait_connected()
                    while not works and "password" not in link.statistics().last_error:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        assert set(server.asked) == {f"localhost:{port}"}
        assert server.connected == 1


async def test_a_proxy_that_swallows_everything_is_noticed_from_both_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels' acknowledgements come from the proxy; only the other side's own word tells that it is there."""
    for module in ("protocol.link", "agent.link_gate", "relay.rendezvous.acceptor"):
        monkeypatch.setattr(f"{module}.watch_untrusted", lambda wanted: 0.2)
    registry = Registry()
    async with relay(registry) as port, proxy_server() as server, trio.open_nursery() as nursery:
        links = [make_link(port, dial=dialer(server).dial, is_proxied=lambda: True)]
        nursery.start_soon(links[0].run)
        with trio.fail_after(10):
            await links[0].wait_connected()
            while not registry.connected():
                await trio.sleep(0.01)
            assert registry.statistics().watched == 1
            await trio.sleep(1.0)
            assert registry.connected()
            server.swallows = True
            # The relay's own interval is half a second longer.
            while registry.connected() or links[0].statistics().connected:
                await trio.sleep(0.01)
        assert registry.statistics().watched == 0
        nursery.cancel_scope.cancel()


async def test_a_proxy_that_opens_connections_is_noticed() -> None:
    # It shows a certificate of its own authority for the relay's name.
    other = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    other.issue_cert("localhost").configure_cert(context)

    async def intercept(stream: trio.SocketStream) -> None:
        try:
            await trio.SSLStream(stream, context, server_side=True).do_handshake()
        except trio.BrokenResourceError:
            return

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery, proxy_server() as server:
        nursery.start_soon(trio.serve_listeners, intercept, [listener])
        link = make_link(listener.socket.getsockname()[1], dial=dialer(server).dial)
        nursery.start_soon(link.run)
        with trio.fail_after(10):
            while "opens encrypted connections" not in link.statistics().last_error:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_both_sides_of_a_tunnel_go_through_proxies() -> None:
    async with tunnel_world() as world, proxy_server(credentials="u:p") as one, proxy_server() as other:
        tokens = world.service.issue(SESSION, USER)
        ends: dict[int, trio.SocketStream] = {}

        async def enter(number: int, through: Dialer) -> None:
            sock = await open_tunnel(through.dial, "localhost", world.port, world.context(), tokens[number])
            ends[number] = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, 0, dialer(one, "u:p"))
                nursery.start_soon(enter, 1, dialer(other))
            async with ends[0], ends[1]:
                await ends[0].send_all(b"hello")
                assert await ends[1].receive_some() == b"hello"
        assert (one.connected, other.connected) == (1, 1)

"""The agent's link: the gate before the relay has proven itself, and dialling again after every kind of end."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent import back_off
from agent.connect.link_connection import DIAL_TIMEOUT
from agent.link import LINK_LIMITS, Link
from agent.link_gate import HelloGate
from protocol.control import AgentHello, CollectionReport, RelayHello, decode_untrusted, encode
from protocol.errors import error_from_document_untrusted
from protocol.identity import NodeKey
from protocol.link import (
    ALPN,
    HELLO_PATH,
    HelloFields,
    channel_of,
    make_relay_hello,
    new_nonce,
    verify_agent_hello_untrusted,
)
from protocol.reverse_http import Client, LinkLost, Response, connect
from protocol.ticket import RelayRoot, TicketSigner, TicketVerifier
from relay.dispatch import PATIENCE

NOW = 1_800_000_000.0
RELAY = "00000000-0000-4000-8000-00000000000a"
NODE = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
ENDPOINT = "33333333-3333-4333-8333-333333333333"
HOST = "relay.example"

IDENTITY = NodeKey.generate()
ROOT = RelayRoot.generate()
CA = trustme.CA()
CERTIFICATE = CA.issue_cert(HOST)
CA_PEM = CA.cert_pem.bytes().decode()


def signer_for(root: RelayRoot, relay_id: str = RELAY, life: float = 86_400) -> TicketSigner:
    key = Ed25519PrivateKey.generate()
    return TicketSigner(relay_id, key, root.certify(key.public_key(), "k1", NOW - 10, NOW + life), "k1")


SIGNER = signer_for(ROOT)


def channel() -> str:
    return channel_of(ssl.PEM_cert_to_DER_cert(CERTIFICATE.cert_chain_pems[0].bytes().decode()))


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """The application that the relay must not reach before it has proven itself."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"behind the gate"})


class FakeRelay:
    """What the agent finds when it dials: `serve` is run with a client on every connection."""

    def __init__(self, serve: Callable[[Client], Any], *, certificate: trustme.LeafCert = CERTIFICATE) -> None:
        self.serve = serve
        self.alpn = ALPN
        self.certificate = certificate
        self.dialled: list[float] = []
        self.reachable = True
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as self._nursery:
            yield
            self._nursery.cancel_scope.cancel()

    async def dial(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        assert (host, port) == (HOST, 8443)
        self.dialled.append(trio.current_time())
        if not self.reachable:
            raise OSError("no route")
        ours, theirs = trio.testing.memory_stream_pair()
        assert self._nursery is not None
        self._nursery.start_soon(self._accept, theirs)
        return ours

    async def _accept(self, raw: trio.testing.MemorySendStream) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.certificate.configure_cert(context)
        context.set_alpn_protocols([self.alpn])
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError:
            return
        async with connect(stream) as client:
            try:
                await self.serve(client)
            except LinkLost:
                return


def link_to(relay: FakeRelay, **changes: Any) -> Link:
    options: dict[str, Any] = {
        "relay_url": f"https://{HOST}:8443",
        "ca_pem": CA_PEM,
        "identity": IDENTITY,
        "node_id": NODE,
        "endpoint_id": ENDPOINT,
        "relay_id": RELAY,
        "relay_root": ROOT.public_pem,
        "app": behind,
        "hello": lambda: HelloFields(version="5", collections=(CollectionReport(id="c", name="n"),)),
        "clock": lambda: NOW,
        "dial": relay.dial,
        "jitter": random.Random(1),
    }
    return Link(**(options | changes))


@asynccontextmanager
async def running(relay: FakeRelay, **changes: Any) -> AsyncIterator[Link]:
    link = link_to(relay, **changes)
    async with relay.running(), trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        yield link
        nursery.cancel_scope.cancel()


def good_hello(**changes: Any) -> RelayHello:
    return make_relay_hello(SIGNER, **({"channel": channel(), "nonce": new_nonce(), "now": NOW} | changes))


async def greet(client: Client, hello: RelayHello) -> Response:
    return await client.request("POST", HELLO_PATH, body=encode(hello))


async def greet_and_stay(client: Client) -> None:
    assert (await greet(client, good_hello())).status == 200
    await client.closed.wait()


async def test_a_proven_relay_is_linked_and_reaches_the_application(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[Any] = []

    async def serve(client: Client) -> None:
        hello = good_hello()
        answer = decode_untrusted((await greet(client, hello)).body, AgentHello)
        verify_agent_hello_untrusted(
            answer, certificate=IDENTITY.certificate_pem, nonce=hello.nonce, channel=channel(), relay_id=RELAY
        )
        seen.append((answer.node_id, answer.endpoint_id, answer.version, answer.collections[0].id))
        seen.append((await client.request("GET", "/anything")).body)
        await client.closed.wait()

    async with running(FakeRelay(serve)) as link:
        await link.wait_connected()
        await trio.sleep(1)
        statistics = link.statistics()
    assert seen == [(NODE, ENDPOINT, "5", "c"), b"behind the gate"]
    assert (statistics.connected, statistics.attempts, statistics.last_error) == (True, 1, "")
    assert (statistics.since, statistics.relay_url) == (NOW, f"https://{HOST}:8443")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/link/collections"),
        ("PUT", "/link/tasks/x"),
        ("GET", "/link/hello"),
        ("GET", "/"),
        ("POST", "/link/hello/"),
        ("POST", "/link//hello"),
        ("DELETE", "/link/hello"),
    ],
)
async def test_everything_before_the_hello_is_403(
    method: str, path: str, autojump_clock: trio.testing.MockClock
) -> None:
    answers: list[Response] = []

    async def serve(client: Client) -> None:
        answers.append(await client.request(method, path))
        # The attempt spoils nothing.
        assert (await greet(client, good_hello())).status == 200
        await client.closed.wait()

    async with running(FakeRelay(serve)) as link:
        await link.wait_connected()
    assert answers[0].status == 403
    assert b"behind" not in answers[0].body


FORGERIES: dict[str, tuple[Callable[[], RelayHello], str]] = {
    "signed by another root": (
        lambda: make_relay_hello(signer_for(RelayRoot.generate()), channel=channel(), nonce=new_nonce(), now=NOW),
        "not signed by it",
    ),
    "another relay": (
        lambda: make_relay_hello(signer_for(ROOT, OTHER), channel=channel(), nonce=new_nonce(), now=NOW),
        "Another relay",
    ),
    "another channel": (lambda: good_hello(channel=channel_of(b"the relay's real certificate")), "intercepts"),
    "another agent": (lambda: good_hello(node_id=OTHER), "another agent"),
    "expired": (lambda: good_hello(now=NOW - 1000), "not valid at this time"),
    "not yet valid": (lambda: good_hello(now=NOW + 1000), "not valid at this time"),
    "expired signing key": (
        lambda: make_relay_hello(signer_for(ROOT, life=-1000), channel=channel(), nonce=new_nonce(), now=NOW),
        "signing key",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_relay_that_cannot_prove_itself_gets_nothing(
    forgery: str, autojump_clock: trio.testing.MockClock
) -> None:
    make, word = FORGERIES[forgery]
    answers: list[Response] = []

    async def serve(client: Client) -> None:
        answers.append(await greet(client, make()))
        await client.closed.wait()

    relay = FakeRelay(serve)
    async with running(relay) as link:
        with trio.fail_after(300):
            while not answers or not link.statistics().last_error:
                await trio.sleep(0.1)
        assert not link.statistics().connected
        assert word in link.statistics().last_error
    assert answers[0].status == 403
    document = decode_untrusted(answers[0].body, dict[str, Any])
    assert word in error_from_document_untrusted(document).sentence
    assert b"signature" not in answers[0].body.replace(b"not signed", b"")


def gate() -> HelloGate:
    return HelloGate(
        behind,
        identity=IDENTITY,
        node_id=NODE,
        endpoint_id=ENDPOINT,
        verifier=TicketVerifier(RELAY, ROOT.public_pem),
        channel=channel(),
        fields=HelloFields,
        clock=lambda: NOW,
    )


async def ask(made: HelloGate, method: str, path: str, *pieces: bytes) -> int:
    """One request straight to the gate; its status."""
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    statuses: list[int] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await made({"type": "http", "method": method, "path": path}, receive, send)
    return statuses[0]


async def test_after_a_false_hello_a_true_one_does_not_open_the_gate() -> None:
    made = gate()
    assert await ask(made, "POST", HELLO_PATH, encode(good_hello(channel=channel_of(b"other")))) == 403
    assert await ask(made, "POST", HELLO_PATH, encode(good_hello())) == 403
    assert await ask(made, "GET", "/link/collections") == 403
    assert not made.proven


async def test_a_hello_in_pieces_is_taken_and_one_without_end_is_not() -> None:
    made = gate()
    assert await ask(made, "POST", HELLO_PATH, *[b" " * 60_000] * 30) == 403
    document = encode(good_hello())
    assert await ask(made, "POST", HELLO_PATH, *(document[n : n + 10] for n in range(0, len(document), 10))) == 200
    assert await ask(made, "GET", "/link/collections") == 200


async def test_a_second_hello_is_refused_and_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[Any] = []

    async def serve(client: Client) -> None:
        await greet(client, good_hello())
        seen.append((await greet(client, good_hello())).status)
        seen.append((await client.request("GET", "/x")).body)
        await client.closed.wait()

    async with running(FakeRelay(serve)) as link:
        await link.wait_connected()
        await trio.sleep(1)
    assert seen == [403, b"behind the gate"]


async def test_a_relay_that_never_greets_is_left(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(client: Client) -> None:
        await client.closed.wait()

    relay = FakeRelay(serve)
    async with running(relay) as link:
        await trio.sleep(34)
        assert "did not greet" in link.statistics().last_error


@pytest.mark.parametrize("stage", ["handshake", "greeting"])
async def test_an_agent_says_that_its_relay_lets_it_wait(
    stage: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """When all agents come back at once a relay takes their connections long before their turn comes."""
    relay = FakeRelay(lambda _client: trio.sleep_forever())
    if stage == "handshake":
        monkeypatch.setattr(relay, "_accept", lambda _raw: trio.sleep_forever())
    relay.reachable = False
    async with running(relay) as link:
        await trio.sleep(1)
        assert "no route" in link.statistics().last_error
        relay.reachable = True
        link.kick()
        await trio.sleep(1)
        # Not worth a word yet.
        assert "no route" in link.statistics().last_error
        await trio.sleep(17)
        assert "wait for its turn, for 18 s" in link.statistics().last_error
        with trio.fail_after(DIAL_TIMEOUT):
            while "wait for its turn" in link.statistics().last_error:
                await trio.sleep(1)
        assert "seconds" in link.statistics().last_error


async def test_a_certificate_of_another_authority_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    relay = FakeRelay(greet_and_stay, certificate=trustme.CA().issue_cert(HOST))
    async with running(relay) as link:
        await trio.sleep(1)
        assert "certificate" in link.statistics().last_error
        assert not link.statistics().connected


async def test_a_certificate_for_another_host_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    relay = FakeRelay(greet_and_stay, certificate=CA.issue_cert("other.example"))
    async with running(relay) as link:
        await trio.sleep(1)
        assert "certificate" in link.statistics().last_error
        assert not link.statistics().connected


async def test_the_systems_trust_does_not_know_a_private_authority(autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeRelay(greet_and_stay), ca_pem=None) as link:
        await trio.sleep(1)
        assert "certificate" in link.statistics().last_error


async def test_something_that_is_no_relay_is_left(autojump_clock: trio.testing.MockClock) -> None:
    relay = FakeRelay(greet_and_stay)
    relay.alpn = "http/1.1"
    async with running(relay) as link:
        await trio.sleep(1)
        assert "no Towpath relay" in link.statistics().last_error


async def test_a_dial_that_hangs_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async def hang(host: str, port: int) -> trio.abc.HalfCloseableStream:
        await trio.sleep_forever()
        raise AssertionError

    async with running(FakeRelay(greet_and_stay), dial=hang) as link:
        await trio.sleep(31)
        assert "did not answer within 30 seconds" in link.statistics().last_error


async def test_a_relay_that_lets_callers_wait_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async def mute(host: str, port: int) -> trio.abc.HalfCloseableStream:
        near, far = trio.testing.memory_stream_pair()
        kept.append(far)
        return near

    kept: list[object] = []
    async with running(FakeRelay(greet_and_stay), dial=mute) as link:
        # Longer than the relay lets anybody wait.
        await trio.sleep(PATIENCE + 1)
        assert link.statistics().last_error == ""
        await trio.sleep(DIAL_TIMEOUT - PATIENCE)
        assert "did not answer within 45 seconds" in link.statistics().last_error


async def test_the_back_off_grows_to_its_cap_with_full_jitter(autojump_clock: trio.testing.MockClock) -> None:
    relay = FakeRelay(greet_and_stay)
    relay.reachable = False
    async with running(relay) as link:
        await trio.sleep(3600)
        assert "cannot be reached: no route" in link.statistics().last_error
        assert link.statistics().attempts == len(relay.dialled)
    pauses = [b - a for a, b in zip(relay.dialled, relay.dialled[1:], strict=False)]
    assert all(pause <= min(back_off.MOST, 2 * 2.0**n) + 0.01 for n, pause in enumerate(pauses))
    late = pauses[6:]
    assert min(late) < 8
    assert max(late) > 23


async def test_a_link_that_breaks_is_dialled_again_soon(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(client: Client) -> None:
        await greet(client, good_hello())
        await trio.sleep(100)

    relay = FakeRelay(serve)
    async with running(relay) as link:
        await trio.sleep(1000)
        assert link.statistics().attempts >= 9
    assert all(b - a <= 102.1 for a, b in zip(relay.dialled, relay.dialled[1:], strict=False))


async def test_a_relay_that_drops_links_at_once_is_not_hammered(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(client: Client) -> None:
        await greet(client, good_hello())
        client.close("go away", retry_after=0)

    relay = FakeRelay(serve)
    async with running(relay) as link:
        await trio.sleep(100)
        assert link.statistics().last_error == "go away"
    assert len(relay.dialled) < 55


async def test_the_relay_can_say_when_to_come_back(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(client: Client) -> None:
        await greet(client, good_hello())
        await trio.sleep(20)
        client.close("The relay restarts.", retry_after=300)

    relay = FakeRelay(serve)
    async with running(relay):
        await trio.sleep(1000)
    first, second = relay.dialled[:2]
    assert 320 <= second - first <= 351


async def test_a_kick_connects_at_once(autojump_clock: trio.testing.MockClock) -> None:
    relay = FakeRelay(greet_and_stay)
    relay.reachable = False
    async with running(relay) as link:
        await trio.sleep(500)
        relay.reachable = True
        before = len(relay.dialled)
        link.kick()
        await trio.testing.wait_all_tasks_blocked()
        assert len(relay.dialled) == before + 1
        await link.wait_connected()
        # A connection that stands is replaced: after a change of network it may be dead without knowing.
        link.kick()
        await trio.sleep(3)
        assert len(relay.dialled) == before + 2
        await link.wait_connected()


class Freezing(trio.abc.ReceiveStream):
    """The receiving half of a connection that hears nothing any more once it is frozen."""

    def __init__(self, inner: trio.abc.ReceiveStream, frozen: list[bool]) -> None:
        self.inner = inner
        self.frozen = frozen

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.inner.receive_some(max_bytes)
        if self.frozen:
            await trio.sleep_forever()
        return data

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_the_link_is_down_after_silence(autojump_clock: trio.testing.MockClock) -> None:
    """The relay's machine freezes, or a router forgets the connection: nothing comes, nothing is closed."""
    relay, frozen = FakeRelay(greet_and_stay), list[bool]()

    async def dial(host: str, port: int) -> trio.abc.HalfCloseableStream:
        stream: Any = await relay.dial(host, port)
        return trio.StapledStream(stream.send_stream, Freezing(stream.receive_stream, frozen))

    silences: list[float] = []
    async with running(relay, dial=dial, on_silence=lambda: silences.append(trio.current_time())) as link:
        await link.wait_connected()
        await trio.sleep(100)
        assert link.statistics().connected
        assert not silences
        frozen.append(True)
        relay.reachable = False
        # The last sign of life is at most one interval old; two intervals of silence end the link.
        await trio.sleep(2 * LINK_LIMITS.ping_interval + 1)
        assert not link.statistics().connected
        assert len(relay.dialled) > 1
        # What is known of the network may be wrong by now: it is gathered anew, once.
        assert len(silences) == 1
        frozen.clear()
        relay.reachable = True
        await link.wait_connected()


@pytest.mark.parametrize("url", ["http://relay.example", "relay.example", "https://", "", "ftp://relay.example"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        link_to(FakeRelay(greet_and_stay), relay_url=url)

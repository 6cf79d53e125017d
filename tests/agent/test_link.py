"""The agent's link: relays that are none, hang or go, and dialling again after every kind of end."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from agent import back_off
from agent.connect.link_connection import DIAL_TIMEOUT, reason_of
from agent.link import LINK_LIMITS
from protocol.control import AgentHello, decode_untrusted
from protocol.link import (
    verify_agent_hello_untrusted,
)
from protocol.reverse_http import Client
from relay.dispatch import PATIENCE
from tests.agent.dialled_relay import (
    CA,
    ENDPOINT,
    HOST,
    IDENTITY,
    NODE,
    NOW,
    RELAY,
    FakeRelay,
    channel,
    good_hello,
    greet,
    greet_and_stay,
    link_to,
    running,
)


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


async def test_a_relay_that_does_not_run_is_told_in_the_systems_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError) as refused:
            await trio.open_tcp_stream("127.0.0.1", taken.getsockname()[1])
    assert reason_of(refused.value) == "Connection refused"
    with pytest.raises(OSError) as unknown:
        raise socket.gaierror(-2, "Name or service not known")
    assert reason_of(unknown.value) == "Name or service not known"
    assert reason_of(OSError("no route")) == "no route"


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


async def test_an_agent_that_is_refused_was_never_linked(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """One that was revoked hears of it after the relay has proven itself. It is told once, and not as a link."""
    caplog.set_level("INFO", "towpath.link")
    linked: list[bool] = []

    async def serve(client: Client) -> None:
        await greet(client, good_hello())
        # The relay looks the agent up.
        await trio.sleep(0.5)
        linked.append(link.statistics().connected)
        client.close("This relay does not know the agent.", retry_after=30)

    async with running(FakeRelay(serve)) as link:
        await trio.sleep(1000)
        linked.append(link.statistics().connected)
    assert len(linked) > 4
    assert not any(linked)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_a_relay_that_asks_has_accepted_the_agent(autojump_clock: trio.testing.MockClock) -> None:
    async def serve(client: Client) -> None:
        await greet(client, good_hello())
        await trio.sleep(0.5)
        await client.request("GET", "/anything")
        await client.closed.wait()

    async with running(FakeRelay(serve)) as link:
        await link.wait_connected()
        assert trio.current_time() < 0.9
    async with running(FakeRelay(greet_and_stay)) as link:
        before = trio.current_time()
        await link.wait_connected()
        assert trio.current_time() - before < 1.5


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

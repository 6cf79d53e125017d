"""Accepting links: only proven agents of this relay get into the registry; everybody else is told why not."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.control import AgentHello, RelayHello, encode
from protocol.identity import NodeKey
from protocol.link import HelloFields, channel_of, make_agent_hello
from protocol.reverse_http import Ending, serve
from protocol.ticket import RelayRoot, TicketSigner
from relay.rendezvous.acceptor import accept_link
from relay.rendezvous.registry import Registry

NOW = 1_800_000_000.0
RELAY = "00000000-0000-4000-8000-00000000000a"
NODE = "11111111-1111-4111-8111-111111111111"
ENDPOINT = "33333333-3333-4333-8333-333333333333"
CHANNEL = channel_of(b"certificate")
IDENTITY = NodeKey.generate()
KEY = Ed25519PrivateKey.generate()
SIGNER = TicketSigner(RELAY, KEY, RelayRoot.generate().certify(KEY.public_key(), "k", NOW - 1, NOW + 9999), "k")

Greeter = Callable[[RelayHello], AgentHello | bytes]


class Directory:
    def __init__(self, **certificates: str) -> None:
        self.certificates = certificates

    async def certificate_of(self, node_id: str) -> str | None:
        await trio.lowlevel.checkpoint()
        return self.certificates.get(node_id)


ENROLLED = Directory(**{NODE: IDENTITY.certificate_pem})


def honest(hello: RelayHello, identity: NodeKey = IDENTITY, **changes: Any) -> AgentHello:
    options: dict[str, Any] = {"node_id": NODE, "endpoint_id": ENDPOINT, "channel": CHANNEL}
    return make_agent_hello(hello, identity, fields=HelloFields(version="9"), **(options | changes))


def agent(answer: Greeter, status: int = 200) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        assert (scope["method"], scope["path"]) == ("POST", "/link/hello")
        made = answer(msgspec.json.decode(body, type=RelayHello))
        document = made if isinstance(made, bytes) else encode(made)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": document})

    return app


async def link(
    app: Any, during: Callable[[Registry], Awaitable[None]] | None = None, nodes: Directory = ENROLLED
) -> tuple[Registry, Ending]:
    """One agent's attempt to link; what the agent was told at the end."""
    registry, endings = Registry(), list[Ending]()
    ours, theirs = trio.testing.memory_stream_pair()

    async def relay() -> None:
        await accept_link(
            theirs, registry=registry, nodes=nodes, signer=SIGNER, channel=CHANNEL, relay_id=RELAY, clock=lambda: NOW
        )

    async def run_agent() -> None:
        endings.append(await serve(ours, app))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay)
        nursery.start_soon(run_agent)
        if during is not None:
            await trio.testing.wait_all_tasks_blocked()
            await during(registry)
    return registry, endings[0]


async def test_a_proven_agent_is_registered_until_its_link_ends(autojump_clock: trio.testing.MockClock) -> None:
    async def during(registry: Registry) -> None:
        assert registry.connected()[NODE].version == "9"
        registry.disconnect(NODE, "enough")

    registry, ending = await link(agent(honest), during)
    assert not registry.is_connected(NODE)
    assert ending.sentence == "enough"


def stranger(hello: RelayHello) -> AgentHello:
    return honest(hello, node_id="99999999-9999-4999-8999-999999999999")


def wrong_key(hello: RelayHello) -> AgentHello:
    return honest(hello, NodeKey.generate())


def wrong_key_right_certificate(hello: RelayHello) -> AgentHello:
    return msgspec.structs.replace(wrong_key(hello), certificate=IDENTITY.certificate_pem)


def wrong_nonce(hello: RelayHello) -> AgentHello:
    return honest(msgspec.structs.replace(hello, nonce="x" * 43))


def other_channel(hello: RelayHello) -> AgentHello:
    return honest(hello, channel=channel_of(b"somebody in between"))


def other_relay(hello: RelayHello) -> AgentHello:
    return honest(msgspec.structs.replace(hello, relay_id=ENDPOINT))


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (stranger, "does not know the agent"),
        (wrong_key, "another key"),
        (wrong_key_right_certificate, "signature is not valid"),
        (wrong_nonce, "signature is not valid"),
        (other_channel, "signature is not valid"),
        (other_relay, "signature is not valid"),
        (lambda hello: b"{}", "cannot be read"),
        (lambda hello: b"\xff" * 100, "cannot be read"),
        (lambda hello: b" " * 2_000_000, "longer than"),
    ],
)
async def test_whoever_cannot_prove_to_be_the_agent_is_refused(
    answer: Greeter, word: str, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)

    async def during(registry: Registry) -> None:
        assert registry.connected() == {}

    _, ending = await link(agent(answer), during)
    assert word in ending.sentence
    assert ending.retry_after == 60
    assert any(word in record.getMessage() for record in caplog.records)


async def test_an_agent_that_does_not_accept_the_relay_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    registry, ending = await link(agent(honest, status=403))
    assert "status 403" in ending.sentence
    assert registry.statistics().links == 0


async def test_an_agent_that_never_answers_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep_forever()

    start = trio.current_time()
    registry, ending = await link(app)
    assert "did not answer" in ending.sentence
    assert trio.current_time() - start < 40
    assert registry.statistics().links == 0


async def test_an_agent_removed_from_the_relay_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    registry, ending = await link(agent(honest), nodes=Directory())
    assert "does not know the agent" in ending.sentence
    assert registry.statistics().links == 0

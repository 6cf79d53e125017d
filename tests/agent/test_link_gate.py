"""The gate of an agent's link: only a true hello opens it, and before that nothing is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from agent.link_gate import HelloGate
from protocol.control import RelayHello, decode_untrusted, encode
from protocol.errors import error_from_document_untrusted
from protocol.link import (
    HELLO_PATH,
    HelloFields,
    channel_of,
    make_relay_hello,
    new_nonce,
)
from protocol.reverse_http import Client, Response
from protocol.ticket import RelayRoot, TicketVerifier
from tests.agent.dialled_relay import (
    ENDPOINT,
    IDENTITY,
    NODE,
    NOW,
    OTHER,
    RELAY,
    ROOT,
    FakeRelay,
    behind,
    channel,
    good_hello,
    greet,
    running,
    signer_for,
)


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

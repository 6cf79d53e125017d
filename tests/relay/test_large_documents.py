"""What is made of the bodies of requests: estimated before it is made, within a bound for all and for each person."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import MutableMapping
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from starlette.requests import Request

from relay.api import documents, holding
from relay.api.developer import body_of
from relay.api.frame import Frame
from relay.api.holding import PIECE, Holding, Memory
from relay.api.transfer_frame import read_document
from relay.audit.notes import notes
from relay.refusal import ApiError

MIB = 1 << 20
MAX_BODY = MIB
# As much as of all documents together.
ALL = 16 * MIB


class Relay:
    """A frame around an application that holds documents until it is told to answer."""

    def __init__(self) -> None:
        self.frame = Frame(self.app, max_body=MAX_BODY, clock=lambda: 0.0)
        self.go = trio.Event()
        self.held = 0
        self.answers: list[tuple[str, int]] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        notes(scope)["who"] = scope["who"]
        document = await read_document(Request(scope, receive))
        self.held += len(document)
        try:
            await self.go.wait()
        finally:
            self.held -= len(document)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, who: str, body: bytes) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((who, message["status"]))

        scope = {"type": "http", "method": "POST", "path": "/v0.10/transfer", "headers": [], "who": who}
        await self.frame({**scope, "client": ("192.0.2.1", 1)}, receive, send)


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch) -> Relay:
    monkeypatch.setattr(holding, "_DOCUMENTS_AT_LEAST", ALL)
    return Relay()


def of_values(count: int) -> bytes:
    return b"[" + b",".join([b"1"] * count) + b"]"


# Of about an eighth of all, though it is two hundredths of the largest body only.
EIGHTH = of_values(ALL // 8 // 130)


async def test_one_persons_documents_are_a_part_and_others_get_in(relay: Relay) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(relay.ask, "alice", EIGHTH)
        with trio.fail_after(5):
            while len(relay.answers) < 14:
                await trio.sleep(0.01)
        assert relay.answers == [("alice", 503)] * 14
        assert relay.held == 6 * (ALL // 8 // 130)
        # What is small is never refused, and somebody else still finds room.
        nursery.start_soon(relay.ask, "alice", of_values(100))
        nursery.start_soon(relay.ask, "bob", EIGHTH)
        with trio.fail_after(5):
            while relay.held < 7 * (ALL // 8 // 130) + 100:
                await trio.sleep(0.01)
        relay.go.set()
    assert relay.answers[14:] == [(who, 200) for who, _ in relay.answers[14:]]
    assert len(relay.answers) == 22


async def test_what_was_held_is_free_once_it_is_answered_or_refused(relay: Relay) -> None:
    relay.go.set()
    for number in range(40):
        await relay.ask("alice", EIGHTH if number % 2 else b"{" + EIGHTH)
    assert relay.answers == [("alice", 200 if number % 2 else 400) for number in range(40)]


def test_what_is_let_go_is_let_go_once() -> None:
    memory = Memory.of(64 << 20)
    one, other = ({"type": "http", "client": (f"192.0.2.{number}", 1)} for number in (1, 2))
    first, second = Holding(one, memory), Holding(other, memory)
    first.body(3 * PIECE)
    second.body(2 * PIECE)
    assert memory.bodies.taken == 3
    for _ in range(2):
        first.let_go()
        assert memory.bodies.taken == 1


async def test_many_small_ones_count_together(relay: Relay) -> None:
    """Of a few hundred bytes each, and many times that in memory."""
    small = b"[" + b",".join([b"{}"] * 2000) + b"]"
    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(relay.ask, "alice", small)
        await trio.testing.wait_all_tasks_blocked()
        assert relay.held * 128 * 2 <= ALL
        assert ("alice", 503) in relay.answers
        nursery.start_soon(relay.ask, "bob", small)
        await trio.testing.wait_all_tasks_blocked()
        assert all(who == "alice" for who, _ in relay.answers)
        relay.go.set()


@pytest.mark.parametrize("body", [of_values(ALL // 128), b'["' + b"a" * (MAX_BODY - 10) + '😀"]'.encode()])
async def test_what_nobody_may_hold_at_any_time_is_not_to_be_asked_again(
    relay: Relay, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holding, "_DOCUMENTS_AT_LEAST", 4 * MIB)
    monkeypatch.setattr(holding, "DOCUMENTS_AT_ONCE", 1)
    monkeypatch.delattr(msgspec.json, "decode")
    made = Relay()
    await made.ask("alice", body)
    assert made.answers == [("alice", 400)]


async def test_the_largest_of_all_may_be_held_by_somebody_who_holds_nothing_else(relay: Relay) -> None:
    relay.go.set()
    largest = holding.Memory.of(MAX_BODY).largest_document
    assert largest > ALL // 4 * 3 - 2 * PIECE
    await relay.ask("alice", of_values((largest - 200) // 130))
    assert relay.answers == [("alice", 200)]


def sizes(body: bytes) -> tuple[int, int]:
    """What a document takes, and what it was thought to take at most."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        document = msgspec.json.decode(body)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert document is not None
    return taken, documents.memory_of(body)


@pytest.mark.parametrize(
    "value",
    [
        *("{}", "[]", "[1]", '{"a":1}', '{"":{}}', '{"":[[]]}', "[[],{}]", "1.5", "300", "12345678901234567890"),
        *('"ab"', '"éé"', '"€"', '"😀"', r'"\u0101"', r'"\ud83d\ude00"', "true"),
        *('{"name of ":1}', '{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1}'),
    ],
)
def test_no_document_takes_more_than_it_was_thought_to(value: str) -> None:
    for number in (1, 1000, 30_000):
        rows = [value.replace("name of ", f"the name of {index}") for index in range(number)]
        taken, thought = sizes(f"[{','.join(rows)}]".encode())
        assert taken <= thought + 1024


@pytest.mark.parametrize(
    "last", ["", "é", "€", "😀", *map(chr, (0x4_0000, 0x8_0000, 0xC_0000, 0x10_0000)), r"\u00e9", r"\ud83d\ude00"]
)
def test_one_character_that_makes_all_others_wide_is_thought_of(last: str) -> None:
    taken, thought = sizes(f'["{"a" * 100_000}{last}"]'.encode())
    assert taken <= thought + 1024


@pytest.mark.parametrize("seed", range(10))
def test_nor_does_one_of_all_kinds(seed: int) -> None:
    chance = random.Random(seed)

    def value(depth: int) -> Any:
        kind = chance.randrange(7 if depth else 4)
        if kind < 4:
            return [None, chance.random(), chance.choice("aé€😀") * chance.randrange(9), chance.getrandbits(60)][kind]
        if kind == 4:
            return [value(depth - 1) for _ in range(chance.randrange(5))]
        return {f"{chance.choice('aé€😀')}{number}": value(depth - 1) for number in range(chance.randrange(9))}

    taken, thought = sizes(msgspec.json.encode([value(6) for _ in range(500)]))
    assert taken <= thought + 1024


async def test_what_developers_send_counts_as_well(relay: Relay) -> None:
    memory = holding.Memory.of(MAX_BODY)
    body = b'{"client":{"x":[' + b",".join([b"{}"] * 12_000) + b"]}}"

    async def ask(who: str) -> int:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        scope: dict[str, Any] = {"type": "http", "method": "POST", "headers": [], "client": ("192.0.2.1", 1)}
        notes(scope)["who"] = who
        held = holding.Holding(scope, memory)
        try:
            return len((await body_of(Request(scope, receive), "client"))["x"])
        except ApiError as error:
            held.let_go()
            return error.status

    assert [await ask("ada") for _ in range(6)] == [*[12_000] * 4, 503, 503]
    assert await ask("grace") == 12_000

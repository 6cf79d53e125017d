"""Decisions about calls that wait are made together: each by what its own caller may do then, by no other's facts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from sqlalchemy import Connection

from protocol.errors import TowpathError
from relay.access.decisions import Ability
from relay.refusal import ApiError
from relay.store.batch import Batch
from relay.store.database import StoreBroken, StoreBusy
from relay.transfer import collections
from relay.transfer.collections import Decision, Question, Sight
from tests.relay.fake_agents import FakeRegistry
from tests.relay.test_transfer_access import rule
from tests.relay.transfer_world import Person, TransferWorld, open_world


class Waiting:
    """Alice's collection, each of whose callers has a folder of their own, and calls to it that wait."""

    def __init__(self, relay: TransferWorld, alice: Person, endpoint: str, people: dict[str, Person]) -> None:
        self.relay, self.alice, self.endpoint, self.people = relay, alice, endpoint, people
        self.rules: dict[str, str] = {}
        self.again: dict[str, Callable[[], Awaitable[object]]] = {}

    async def decide(self) -> dict[str, str]:
        """What becomes of the call of each of them, all decided about at once."""
        told: dict[str, str] = {}

        async def one(name: str) -> None:
            try:
                await self.again[name]()
                told[name] = "goes on"
            except ApiError as error:
                told[name] = error.code
            except Exception as error:
                told[name] = type(error).__name__

        async with trio.open_nursery() as nursery:
            for name in self.again:
                nursery.start_soon(one, name)
        return told


@pytest.fixture
async def waiting(world: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Waiting]:
    asked: list[Callable[[], Awaitable[object]]] = []
    call = FakeRegistry.call

    async def noting(self: FakeRegistry, *arguments: Any, **options: Any) -> bytes:
        if options.get("decide_again") is not None:
            asked.append(options["decide_again"])
        return await call(self, *arguments, **options)

    monkeypatch.setattr(FakeRegistry, "call", noting)
    async with open_world(world) as relay:
        alice = await relay.person("alice")
        endpoint, agent = await relay.collection(alice, "Shared")
        agent.collections = [type(one)(id=one.id, name=one.name, shareable=True) for one in agent.collections]
        relay.registry.up(agent)
        with trio.fail_after(30):
            while not await relay.store.read(lambda c: getattr(collections.load(c, endpoint), "shareable", False)):
                await trio.sleep(0.01)
        people = {name: await relay.person(name) for name in ("bob", "carol", "dave")}
        scene = Waiting(relay, alice, endpoint, people)
        for name, person in people.items():
            opened = await alice.post(f"/endpoint/{endpoint}/access", rule(person.id, path=f"/{name}"), status=201)
            scene.rules[name] = str(opened["access_id"])
        for name, person in {**people, "alice": alice}.items():
            await person.get(f"/operation/endpoint/{endpoint}/ls", path=f"/{name}/")
            scene.again[name] = asked.pop()
        yield scene


MKDIR = {"DATA_TYPE": "mkdir", "path": "/new"}
GO_ON = dict.fromkeys(["bob", "carol", "dave", "alice"], "goes on")


async def test_each_is_decided_about_by_what_they_may_do(waiting: Waiting) -> None:
    assert await waiting.decide() == GO_ON
    gone = dict(GO_ON)
    for name, rule_id in waiting.rules.items():
        await waiting.alice.delete(f"/endpoint/{waiting.endpoint}/access/{rule_id}")
        gone[name] = "EndpointNotFound"
        assert await waiting.decide() == gone


async def test_what_one_comes_to_besides_is_nothing_to_the_others(waiting: Waiting) -> None:
    """Carol may do all that she did, and links would lead her elsewhere by now."""
    opening = f"/endpoint/{waiting.endpoint}/access"
    opened = await waiting.alice.post(opening, rule(waiting.people["carol"].id, path="/more"), status=201)
    assert await waiting.decide() == {**GO_ON, "carol": "Conflict"}
    await waiting.alice.delete(f"{opening}/{opened['access_id']}")
    assert await waiting.decide() == GO_ON


async def test_a_decision_that_fails_fails_its_own_call_alone(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    require = Sight.require

    def failing(self: Sight, ability: Ability, *more: Any) -> Any:
        if waiting.people["bob"].id in self._held._subject.identities:
            raise RuntimeError("on purpose")
        return require(self, ability, *more)

    monkeypatch.setattr(Sight, "require", failing)
    assert await waiting.decide() == {**GO_ON, "bob": "RuntimeError"}


@pytest.mark.parametrize("trouble", [StoreBusy("It is busy."), StoreBroken("It is full.")])
async def test_trouble_of_the_relays_database_is_not_told_as_the_agents(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch, trouble: TowpathError
) -> None:
    """Clients repeat what the relay fails at, and not what an endpoint fails at."""

    async def busy(*_: object) -> None:
        raise trouble

    async def deciding(_registry: FakeRegistry, *_arguments: Any, **options: Any) -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "ask", busy)
            await options["decide_again"]()
        raise AssertionError("It was not asked again.")

    monkeypatch.setattr(FakeRegistry, "call", deciding)
    place = f"/operation/endpoint/{waiting.endpoint}"
    for method, verb, more in (("GET", "ls", {"params": {"path": "/"}}), ("POST", "mkdir", {"json": MKDIR})):
        said = await waiting.alice.refused(method, f"{place}/{verb}", 503, "ServiceUnavailable", **more)
        assert said == trouble.sentence


async def test_one_persons_calls_are_looked_at_once_however_many_wait(
    waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody's thousand calls take the time in which others are decided about."""
    made: list[str] = []
    init = Sight.__init__

    def noting(self: Sight, asked_for: str, *more: Any) -> None:
        made.append(asked_for)
        init(self, asked_for, *more)

    monkeypatch.setattr(Sight, "__init__", noting)
    bob = waiting.people["bob"].id

    def decide(sight: Sight) -> Decision:
        return sight.require(Ability.READ, [(b"bob",)]), sight.reach(Ability.READ)

    def work(connection: Connection) -> list[Decision | ApiError]:
        return collections.decide_all(connection, [Question(waiting.endpoint, bob, decide)] * 1000, 1e9)

    answers = await waiting.relay.store.read(work)
    assert [answer[1] for answer in answers if not isinstance(answer, ApiError)] == [["/bob"]] * 1000
    assert made == [waiting.endpoint]


@pytest.mark.parametrize("seed", range(10))
async def test_no_decision_rests_on_what_was_so_before_it_was_asked_for(
    autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    """A transaction shows the database as it was when it began: who asks later is answered by the next one."""
    random, version = Random(seed), 0

    async def transact(work: Callable[[Any], Any]) -> Any:
        seen = version
        await trio.sleep(random.uniform(0, 0.2))
        return work(seen)

    def decided(seen: Any, asked: Sequence[int]) -> list[int]:
        return [seen] * len(asked)

    batch: Batch[int, int] = Batch(transact, decided, most=random.choice((1, 3, 256)))
    looked = 0

    async def ask() -> None:
        nonlocal looked
        for _ in range(20):
            await trio.sleep(random.uniform(0, 0.1))
            before = version
            assert await batch.ask(0) >= before
            looked += 1

    async def change() -> None:
        nonlocal version
        while True:
            await trio.sleep(0.01)
            version += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        async with trio.open_nursery() as askers:
            for _ in range(8):
                askers.start_soon(ask)
        nursery.cancel_scope.cancel()
    assert looked == 160

"""Agents are told of collections that they name and the relay does not have as theirs."""

from __future__ import annotations

import uuid

import trio
from trio.testing import MockClock

from protocol.control import CollectionReport
from protocol.errors import ItemFailed, RetryLater
from tests.relay.fake_agents import once
from tests.relay.steward_scene import MOMENT, Scene


async def test_at_once_when_one_is_deleted_and_at_each_link_after_that(clock: MockClock, scene: Scene) -> None:
    scene.up()
    await trio.sleep(MOMENT)
    assert scene.source.missing == []
    await scene.alice.delete(f"/endpoint/{scene.a}")
    await trio.sleep(MOMENT)
    assert scene.source.missing == [[scene.a]]
    for _ in range(2):
        scene.relay.registry.down(scene.source)
        scene.relay.registry.up(scene.source)
        await trio.sleep(MOMENT)
    assert scene.source.missing == [[scene.a]] * 3
    assert scene.destination.missing == []


async def test_while_it_is_away_nothing_fails(clock: MockClock, scene: Scene) -> None:
    await scene.alice.delete(f"/endpoint/{scene.a}")
    await trio.sleep(MOMENT)
    scene.up()
    await trio.sleep(MOMENT)
    assert scene.source.missing == [[scene.a]]


async def test_what_is_somebody_elses_is_as_little_there(clock: MockClock, scene: Scene) -> None:
    """Of what is another agent's no more is said than of what is nowhere."""
    nowhere = str(uuid.uuid4())
    scene.source.collections = [
        *scene.source.collections,
        *(CollectionReport(id=one, name="x") for one in (scene.b, nowhere, "no id" * 1000)),
    ]
    scene.up()
    await trio.sleep(MOMENT)
    assert scene.source.missing == [sorted([scene.b, nowhere])]


async def test_a_changed_configuration_is_answered_as_well(clock: MockClock, scene: Scene) -> None:
    scene.up()
    await trio.sleep(MOMENT)
    nowhere = CollectionReport(id=str(uuid.uuid4()), name="x")
    scene.source.say("collections", "", collections=[*scene.source.collections, nowhere])
    await trio.sleep(MOMENT)
    assert scene.source.missing == [[nowhere.id]]


async def test_an_agent_that_cannot_be_told_goes_on(clock: MockClock, scene: Scene) -> None:
    """An older one has no such route."""
    await scene.alice.delete(f"/endpoint/{scene.a}")
    await trio.sleep(MOMENT)
    for error in (ItemFailed("No such route.", code="NO_SUCH_ROUTE"), RetryLater("Later.")):
        scene.source.refuse = once(error, "POST /link/collections/missing")
        scene.relay.registry.up(scene.source)
        await trio.sleep(MOMENT)
        assert scene.source.missing == []
        assert scene.relay.steward.statistics().attended == 1
        scene.relay.registry.down(scene.source)

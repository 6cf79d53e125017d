"""The steward's stories, three: offers of paths, and addresses that a source learns of later."""

from __future__ import annotations

import msgspec
import pytest
import trio
from trio.testing import MockClock

from protocol.candidates import Candidate, PathAnswer, PathGo, PathOffer
from tests.relay.fake_agents import FakeAgent
from tests.relay.steward_scene import MOMENT, Scene

LATE = Candidate(kind="portmap", host="192.0.2.7", port=7000)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, object]]:
    """What both agents are told of paths: node, request and document."""
    found: list[tuple[str, str, object]] = []
    usual = FakeAgent.answer

    def answer(self: FakeAgent, method: str, path: str, query: dict[str, list[str]], document: object) -> object:
        if path.endswith(("/offer", "/go", "/candidates")):
            found.append((self.node_id, path.rpartition("/")[2], document))
            if isinstance(document, PathOffer):
                return PathAnswer(session_id=document.session_id, generation=document.generation)
            return None
        return usual(self, method, path, query, document)

    monkeypatch.setattr(FakeAgent, "answer", answer)
    return found


def offer(scene: Scene, task_id: str) -> PathOffer:
    session_id = scene.destination.orders[task_id][-1].session_id
    return PathOffer(session_id=session_id, task_id=task_id, generation=1, token="0" * 32, count=1)


async def test_addresses_that_a_source_learns_of_later_reach_the_destination(
    clock: MockClock, scene: Scene, told: list[tuple[str, str, object]]
) -> None:
    scene.up()
    task_id = await scene.task()
    made = offer(scene, task_id)
    scene.destination.say("path_offer", task_id, durable=False, offer=made)
    await trio.sleep(MOMENT)
    assert {(node, what) for node, what, _ in told} == {
        (scene.source.node_id, "offer"),
        (scene.source.node_id, "go"),
        (scene.destination.node_id, "go"),
    }
    assert all(document.generation == 1 for _, _, document in told if isinstance(document, PathGo))
    told.clear()
    more = PathAnswer(session_id=made.session_id, generation=1, candidates=[LATE])
    # Nobody but the task's source speaks for it, and only of its own session.
    scene.destination.say("path_candidates", task_id, durable=False, candidates=more)
    await trio.sleep(MOMENT)
    other = PathAnswer(session_id=task_id, generation=1, candidates=[LATE])
    scene.source.say("path_candidates", task_id, durable=False, candidates=other)
    await trio.sleep(MOMENT)
    assert told == []
    scene.source.say("path_candidates", task_id, durable=False, candidates=more)
    await trio.sleep(MOMENT)
    assert told == [(scene.destination.node_id, "candidates", more)]


async def test_who_guesses_a_task_cannot_use_up_what_it_may_ask(
    clock: MockClock, scene: Scene, told: list[tuple[str, str, object]]
) -> None:
    scene.up()
    task_id = await scene.task()
    probe = msgspec.structs.replace(offer(scene, task_id), probe=True)
    # Nobody but the task's destination asks for it.
    for _ in range(3):
        scene.source.say("path_offer", task_id, durable=False, offer=probe)
    await trio.sleep(MOMENT)
    assert told == []
    scene.destination.say("path_offer", task_id, durable=False, offer=probe)
    await trio.sleep(MOMENT)
    assert [what for _, what, _ in told] == ["offer", "go", "go"]
    told.clear()
    # Nor does anybody keep its source's addresses from being passed on, at the very same moment.
    more = PathAnswer(session_id=probe.session_id, generation=1, candidates=[LATE])
    scene.destination.say("path_candidates", task_id, durable=False, candidates=more)
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    scene.source.say("path_candidates", task_id, durable=False, candidates=more)
    await trio.sleep(MOMENT)
    assert told == [(scene.destination.node_id, "candidates", more)]


async def test_an_offer_does_not_wait_for_an_agent_that_takes_no_acknowledgement(
    clock: MockClock, scene: Scene, told: list[tuple[str, str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.up()
    task_id = await scene.task()
    usual = scene.relay.registry.call

    async def call(node_id: str, method: str, path: str, **options: object) -> bytes:
        if path.endswith("/acknowledge"):
            await trio.sleep(20)
        return await usual(node_id, method, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scene.relay.registry, "call", call)
    for code in ("ONE", "TWO"):
        scene.destination.say("event", task_id, code=code)
        await trio.sleep(0.1)
    scene.destination.say("path_offer", task_id, durable=False, offer=offer(scene, task_id))
    await trio.sleep(MOMENT)
    assert [what for _, what, _ in told] == ["offer", "go", "go"]
    assert scene.destination.acknowledged == []
    await trio.sleep(60)
    # The newest number stands for those before it.
    assert scene.destination.acknowledged == [1, 2]


async def test_an_offer_reaches_a_source_that_is_being_started_again(
    clock: MockClock, scene: Scene, told: list[tuple[str, str, object]]
) -> None:
    scene.up()
    task_id = await scene.task()
    scene.relay.registry.down(scene.source)
    await trio.sleep(MOMENT)
    scene.destination.say("path_offer", task_id, durable=False, offer=offer(scene, task_id))
    await trio.sleep(1)
    assert told == []
    scene.relay.registry.up(scene.source)
    await trio.sleep(MOMENT)
    assert [what for _, what, _ in told] == ["offer", "go", "go"]

"""Both sides of a task are told at once, where the source's agent can take that: what the relay knows of the source
goes with the order, and what the source then says follows."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from protocol.candidates import Candidate
from protocol.control import ARRANGED, MEETS, TUNNELLED
from protocol.errors import AccessDenied, RetryLater
from tests.relay.fake_agents import once
from tests.relay.steward_scene import MOMENT, Scene

# Where the fake agent says it is when it is asked for a session.
ANSWERED = Candidate(kind="host", host="192.0.2.1", port=4000)
STANDING = Candidate(kind="host", host="192.0.2.7", port=4007)


def _able(scene: Scene, *standing: Candidate) -> None:
    for agent in (scene.source, scene.destination):
        agent.abilities, agent.standing = [ARRANGED, TUNNELLED], list(standing)
    scene.up()


@pytest.fixture
def slow(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Sessions take a minute to be answered."""
    call = type(scene.relay.registry).call

    async def later(self: Any, node_id: str, method: str, path: str, **options: Any) -> bytes:
        if path.startswith("/link/sessions/"):
            await trio.sleep(60)
        answer: bytes = await call(self, node_id, method, path, **options)
        return answer

    monkeypatch.setattr(type(scene.relay.registry), "call", later)
    return scene


async def test_the_order_does_not_wait_for_the_sources_answer(clock: MockClock, slow: Scene) -> None:
    _able(slow, STANDING)
    task_id = await slow.task()
    (order,) = slow.destination.orders[task_id]
    assert slow.source.sessions == {}
    assert order.session is not None
    assert (order.session.generation, order.session.candidates) == (0, [STANDING])
    assert order.session.certificate == slow.source.key.certificate_pem
    assert order.arranged is not None
    await trio.sleep(60)
    (session,) = slow.source.sessions[order.session_id]
    assert session.arranged is not None
    assert session.arranged.token == order.arranged.token
    assert session.arranged.candidates == [STANDING]
    # It says something else than it did at its link.
    (answer,) = slow.destination.session_answers[task_id]
    assert answer.candidates == [ANSWERED]
    assert (await slow.row(task_id)).session_open


@pytest.mark.parametrize("older", ["", "source", "destination"])
async def test_both_show_their_ports_where_both_can(clock: MockClock, scene: Scene, older: str) -> None:
    for name in ("source", "destination"):
        agent = getattr(scene, name)
        agent.abilities, agent.standing = [ARRANGED, *([] if name == older else [MEETS])], [ANSWERED]
    scene.up()
    task_id = await scene.task()
    (order,) = scene.destination.orders[task_id]
    (session,) = scene.source.sessions[order.session_id]
    assert order.arranged is not None
    assert session.arranged is not None
    words = order.arranged.show, session.arranged.show
    assert all(words) == (not older)
    assert any(words) == (not older)
    assert words[0] != words[1] or older


async def test_an_answer_that_says_what_is_known_is_not_passed_on(clock: MockClock, scene: Scene) -> None:
    _able(scene, ANSWERED)
    task_id = await scene.task()
    assert len(scene.destination.orders[task_id]) == len(scene.source.sessions) == 1
    assert task_id not in scene.destination.session_answers


async def test_an_agent_of_before_is_asked_first_and_gets_nothing_arranged(clock: MockClock, slow: Scene) -> None:
    slow.destination.abilities = [ARRANGED]
    slow.up()
    task_id = await slow.task()
    assert task_id not in slow.destination.orders
    await trio.sleep(60)
    (order,) = slow.destination.orders[task_id]
    assert order.arranged is None
    assert order.session is not None
    assert order.session.candidates == [ANSWERED]


async def test_a_destination_of_before_is_told_at_once_but_nothing_is_arranged(clock: MockClock, slow: Scene) -> None:
    slow.source.abilities, slow.source.standing = [ARRANGED], [STANDING]
    slow.up()
    task_id = await slow.task()
    (order,) = slow.destination.orders[task_id]
    assert order.session is not None
    assert order.arranged is None
    await trio.sleep(60)
    assert slow.source.sessions[order.session_id][0].arranged is None


async def test_a_source_that_refuses_ends_the_task_at_both_ends(clock: MockClock, scene: Scene) -> None:
    _able(scene, ANSWERED)
    scene.source.refuse = once(AccessDenied("The owner does not share this.", code="PERMISSION_DENIED"), "PUT")
    task_id = await scene.task()
    shown = await scene.show(task_id)
    assert (shown["status"], shown["fatal_error"]["code"]) == ("FAILED", "PERMISSION_DENIED")
    assert [order.desired for order in scene.destination.orders[task_id]] == ["run", "cancel"]
    assert scene.source.withdrawn == [scene.destination.orders[task_id][0].session_id]


async def test_a_source_that_is_busy_is_asked_again(clock: MockClock, scene: Scene) -> None:
    _able(scene, ANSWERED)
    scene.source.refuse = once(RetryLater("It is busy.", code="SOURCE_BUSY"), "PUT")
    task_id = await scene.task()
    assert len(scene.destination.orders[task_id]) == 1
    await trio.sleep(10 * MOMENT)
    assert len(scene.source.sessions) == 1
    assert len(scene.destination.session_answers[task_id]) == 1


async def test_an_order_that_does_not_arrive_is_given_again(clock: MockClock, scene: Scene) -> None:
    _able(scene, ANSWERED)
    scene.destination.refuse = once(RetryLater("Not now."), "PUT")
    task_id = await scene.task()
    await trio.sleep(10 * MOMENT)
    (order,) = scene.destination.orders[task_id]
    assert order.items is not None
    assert order.session is not None
    # The source may have been told before the order failed: it is told again, and the session ends with the task.
    scene.destination.succeed(task_id)
    await trio.sleep(MOMENT)
    assert scene.source.withdrawn == [order.session_id]


@pytest.mark.parametrize("failing", ["order", "answer"])
async def test_what_is_told_is_withdrawn_after_a_cancel(clock: MockClock, slow: Scene, failing: str) -> None:
    """Also when the source answers after the task has ended."""
    _able(slow, STANDING)
    if failing == "order":
        slow.destination.refuse = once(RetryLater("Not now."), "PUT")
    task_id = await slow.task()
    await slow.alice.post(f"/task/{task_id}/cancel")
    await trio.sleep(200)
    if task_id in slow.destination.tasks:
        slow.destination.observe(task_id, "CANCELED")
    await trio.sleep(200)
    assert (await slow.show(task_id))["status"] == "FAILED"
    assert not (await slow.row(task_id)).session_open
    assert slow.source.withdrawn


async def test_a_later_order_of_a_task_has_nothing_arranged(clock: MockClock, scene: Scene) -> None:
    _able(scene, ANSWERED)
    task_id = await scene.task()
    await scene.alice.put(f"/task/{task_id}", {"DATA_TYPE": "task", "label": "another"})
    await trio.sleep(MOMENT)
    first, second = scene.destination.orders[task_id]
    assert first.arranged is not None
    assert second.arranged is None
    assert second.session is not None

"""Connections that come to a source before the relay has told it of their session, or while it cannot look."""

from __future__ import annotations

import uuid

import pytest
import trio

from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.tasks import served_session
from protocol import session
from protocol.control import SessionOrder
from tests.agent.session_scene import INSTANCE, PATIENCE, Scene, messages_in, scene, visit

__all__ = ["scene"]

pytestmark = pytest.mark.usefixtures("workers_forked")


async def test_a_visit_while_the_state_cannot_be_read_is_refused_and_no_more(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(_session_id: str) -> SessionOrder | None:
        raise StateTrouble("The list of tasks is in use by another program or another machine.")

    assert scene.made.alpha.service is not None
    served = scene.made.alpha.service.sessions
    context = scene.context(scene.made.beta.key)
    with monkeypatch.context() as patched:
        patched.setattr(served._node.store, "session", locked)
        assert await trio.to_thread.run_sync(visit, scene, context, b"") == b""
    assert served.refused == 1
    monkeypatch.setattr(served_session, "EARLY_PATIENCE", 0.05)
    assert await trio.to_thread.run_sync(visit, scene, context, b"", str(uuid.uuid4())) == b""
    assert served.refused == 2


async def _later_session(scene: Scene) -> SessionOrder:
    task, session_id = str(uuid.uuid4()), str(uuid.uuid4())
    ticket = scene.made.ticket(
        task, session_id, scene.made.alpha.grant("r", ["/open"]), scene.made.beta.grant("rw", ["/"])
    )
    return SessionOrder(session_id=session_id, task_id=task, ticket=ticket, peer=scene.made.beta.party)


async def test_a_connection_that_comes_before_its_session_is_served_when_that_comes(scene: Scene) -> None:
    service = scene.made.alpha.service
    assert service is not None
    order = await _later_session(scene)
    context = scene.context(scene.made.beta.key)
    served: list[bytes] = []

    async def come() -> None:
        hello = session.encode(session.Hello(order.ticket, INSTANCE))

        def greet() -> None:
            with scene.dial(context, order.session_id) as sock:
                sock.sendall(hello)
                served.append(sock.recv(65536))

        await trio.to_thread.run_sync(greet)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come)
        with trio.fail_after(PATIENCE):
            while not service.sessions._early:
                await trio.sleep(0.005)
        # Another session does not help it.
        await service.put_session(await _later_session(scene))
        await trio.sleep(0.05)
        assert not served
        await service.put_session(order)
    assert isinstance(messages_in(served[0])[0], session.HelloAnswer)
    assert service.sessions._early == 0


async def test_few_wait_for_a_session_and_not_for_long(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    service = scene.made.alpha.service
    assert service is not None
    monkeypatch.setattr(served_session, "EARLY_PATIENCE", 0.3)
    monkeypatch.setattr(served_session, "MAX_EARLY", 3)
    most: list[int] = []

    async def come() -> None:
        context = scene.context(scene.made.beta.key)
        assert await trio.to_thread.run_sync(visit, scene, context, b"", str(uuid.uuid4())) == b""
        most.append(service.sessions._early)

    refused = service.sessions.refused
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(come)
    assert service.sessions.refused == refused + 8
    assert (max(most), service.sessions._early) == (3, 0)

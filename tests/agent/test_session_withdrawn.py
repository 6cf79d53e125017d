"""A session that is withdrawn, or whose collection the owner takes back, while a connection is being handed over."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from agent.config.keys import CollectionConfig
from agent.policy import Policy
from agent.transfer.processes.channel import ChannelClosed, Incoming
from agent.transfer.tasks import served_session
from agent.transfer.tasks.served_session import ServedSessions, _Served

COLLECTION = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"
SESSION = "0d4a9a6e-3c31-4d1c-9a3a-1f6f0c6a9d11"


class Grounds:
    """A source whose workers are begun and never come up by themselves, with one session in its books."""

    def __init__(self) -> None:
        self.policy = Policy([CollectionConfig(id=COLLECTION, name="One", root="/data")])
        self.orders: dict[str, Any] = {SESSION: SimpleNamespace(session_id=SESSION)}
        self.begun: list[_Served] = []
        self.lane_begun = trio.Event()
        self.store = SimpleNamespace(session=self.session)
        self.sessions = ServedSessions(cast("Any", self))
        self.sessions.nursery = cast("trio.Nursery", SimpleNamespace(start_soon=self._begin))

    def session(self, session_id: str) -> Any:
        return self.orders.get(session_id)

    def check_session(self, _order: Any, _now: float) -> Any:
        self.policy.check(COLLECTION, (), "r")
        return SimpleNamespace(source=SimpleNamespace(collection_id=COLLECTION))

    def _begin(self, _function: object, _order: Any, served: _Served) -> None:
        self.begun.append(served)

    def withdraw(self) -> None:
        """As the service does it."""
        del self.orders[SESSION]
        self.sessions.cut(SESSION)

    def take_back(self) -> None:
        """The owner removes the collection."""
        self.policy.replace([])
        self.sessions.cut_collections([COLLECTION])


@pytest.fixture
def grounds(monkeypatch: pytest.MonkeyPatch) -> Grounds:
    monkeypatch.setattr(served_session, "EARLY_PATIENCE", 0.05)
    return Grounds()


@pytest.fixture
def connection() -> Iterator[Any]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield trio.socket.from_stdlib_socket(ours)


@pytest.mark.parametrize("how", ["withdraw", "take_back"])
async def test_what_is_taken_back_while_its_worker_starts_gets_no_other_worker(
    grounds: Grounds, connection: Any, how: str
) -> None:
    with trio.move_on_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grounds.sessions.deliver, SESSION, "control", connection)
            while not grounds.begun:
                await trio.sleep(0.001)
            getattr(grounds, how)()
            assert grounds.begun[0].scope.cancel_called
            # What the worker's own task does when it is cancelled.
            grounds.begun[0].ready.set()
    assert (len(grounds.begun), grounds.sessions.count, grounds.sessions.refused) == (1, 0, 1)


async def test_one_whose_worker_died_as_it_started_gets_another(grounds: Grounds, connection: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(grounds.sessions.deliver, SESSION, "control", connection)
        with trio.fail_after(5):
            while not grounds.begun:
                await trio.sleep(0.001)
            del grounds.sessions._served[SESSION]
            grounds.begun[0].ready.set()
            while len(grounds.begun) < 2:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert grounds.sessions.refused == 0


class _Worker:
    """Keeps what it is handed over, or is gone already."""

    def __init__(self, *, gone: bool) -> None:
        self.gone, self.taken = gone, list[Incoming]()

    async def send(self, message: Incoming, descriptors: tuple[int, ...]) -> None:
        await trio.lowlevel.checkpoint()
        assert len(descriptors) == message.descriptors == 1
        if self.gone:
            raise ChannelClosed
        self.taken.append(message)


@pytest.mark.parametrize("kind", ["control", "lane"])
async def test_one_that_is_gone_when_the_connection_is_handed_over_gets_another(
    grounds: Grounds, connection: Any, kind: str
) -> None:
    """The connection is the source's to keep until a worker has it; the destination knows of none that was lost."""
    workers = [_Worker(gone=True), _Worker(gone=False)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(grounds.sessions.deliver, SESSION, kind, connection)
        with trio.fail_after(5):
            for number, worker in enumerate(workers, 1):
                while len(grounds.begun) < number:
                    await trio.sleep(0.001)
                grounds.begun[-1].channel = cast("Any", worker)
                grounds.begun[-1].ready.set()
    assert [[message.kind for message in worker.taken] for worker in workers] == [[], [kind]]
    assert (grounds.sessions.count, grounds.sessions.refused) == (1, 0)
    assert grounds.lane_begun.is_set() == (kind == "lane")


async def test_what_is_withdrawn_while_it_is_looked_up_is_not_served(grounds: Grounds, connection: Any) -> None:
    """The order is read before it goes, and the answer comes after."""
    reading, go_on = threading.Event(), threading.Event()

    def slowly(session_id: str) -> Any:
        found = Grounds.session(grounds, session_id)
        reading.set()
        assert go_on.wait(5)
        return found

    grounds.store.session = slowly
    with trio.move_on_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(grounds.sessions.deliver, SESSION, "lane", connection)
            await trio.to_thread.run_sync(reading.wait)
            grounds.withdraw()
            go_on.set()
    assert (len(grounds.begun), grounds.sessions.refused) == (0, 1)

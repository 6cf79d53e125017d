"""What one person whose name is known may take of what all share: turns at the database, and what is read again and
again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from sqlalchemy import Connection

from relay.audit.recorder import Recorder
from relay.audit.trail import Entry
from relay.store.batch import Batch
from relay.store.database import Store, asking
from relay.transfer import bookmarks, collections, rules
from tests.relay.relay_world import RelayWorld
from tests.relay.test_transfer_access import rule
from tests.relay.transfer_world import open_world, transfer_document


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_who_asks_for_much_leaves_turns_at_the_database(relay_store: Store, kind: str) -> None:
    go, order = threading.Event(), list[str]()

    async def ask(who: str) -> None:
        def work(_connection: Connection) -> None:
            if who == "mallory":
                go.wait(10)
            order.append(who)

        asking.set(who)
        await getattr(relay_store, kind)(work)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask, "mallory")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, "bob")
        await trio.testing.wait_all_tasks_blocked()
        if kind == "read":
            # Readers are left for him while all of mallory's are held. Else he would race with them, and the first use
            # of a reader takes longer than all of theirs.
            with trio.fail_after(5):
                while "bob" not in order:
                    await trio.sleep(0.01)
        go.set()
    assert len(order) == 21
    # There are four readers.
    assert order.index("bob") <= 4, order


async def test_for_whom_the_database_is_asked(world: RelayWorld) -> None:
    async with open_world(world, run=False) as relay:
        alice = await relay.person("alice")
        read, seen = relay.store.read, list[str]()

        async def noting(work: Callable[[Connection], Any]) -> Any:
            seen.append(asking.get())
            return await read(work)

        relay.store.read = noting  # type: ignore[method-assign]
        await alice.get("/task_list")
        # Before the token is known it is the address that asks.
        assert seen == ["127.0.0.1", alice.id]
        assert asking.get() == ""


async def test_who_asks_for_all_who_wait_asks_in_nobodys_name() -> None:
    async def transact(work: Callable[[Any], Any]) -> Any:
        return [asking.get()]

    batch: Batch[str, str] = Batch(transact, lambda _connection, asked: asked)
    seen = list[str]()

    class Log(Store):
        async def write(self, work: Callable[[Connection], Any], *, aside: bool = False) -> Any:
            seen.append(asking.get())

    recorder = Recorder(Log("sqlite:////nowhere"), lambda: 0.0)
    mine = asking.set("mallory")
    assert await batch.ask("?") == ""
    await recorder.record(Entry(time=0.0, action="look", outcome="done"))
    assert seen == [""]
    assert asking.get() == "mallory"
    asking.reset(mine)


async def test_what_every_list_repeats_is_bounded(world: RelayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bookmarks, "MAX_PATHS", 100)
    monkeypatch.setattr(rules, "MAX_PATHS", 100)
    async with open_world(world, run=False) as relay:
        alice = await relay.person("alice")
        mine, _ = await relay.collection(alice, "A")
        await relay.store.write(lambda connection: collections.change(connection, mine, {"shareable": True}))
        path = f"/{'x' * 58}/"
        bookmark = {"DATA_TYPE": "bookmark", "endpoint_id": mine, "path": path}
        await alice.post("/bookmark", {**bookmark, "name": "one"}, status=201)
        await alice.refused("POST", "/bookmark", 409, "Conflict", json={**bookmark, "name": "two"})
        await alice.post(f"/endpoint/{mine}/access", rule(alice.id, path=path), status=201)
        more = rule(alice.id, path=f"{path}y/")
        await alice.refused("POST", f"/endpoint/{mine}/access", 409, "Conflict", json=more)
        named = {"DATA_TYPE": "filter_rule", "method": "exclude", "name": "x" * 1024}
        for count, status in ((64, 202), (65, 400)):
            document = transfer_document(mine, mine, filter_rules=[named] * count)
            assert (await alice.ask("POST", "/transfer", json=document)).status_code == status

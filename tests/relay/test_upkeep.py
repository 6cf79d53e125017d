"""What the relay does by itself from time to time: what nobody needs any more is forgotten, whatever its clock does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from sqlalchemy import select
from trio.testing import MockClock

from relay import server
from relay.settings import Settings
from relay.store import transfer_tables as tables
from relay.tls import CertificateStatistics
from relay.transfer import task_rows
from relay.transfer.task_rows import forget_items, load_items, load_scope, unpack_items
from tests.relay.relay_world import START
from tests.relay.steward_scene import MOMENT, Scene


async def items(scene: Scene, task_id: str) -> int:
    return len(unpack_items(await scene.relay.store.read(lambda connection: load_items(connection, task_id))))


async def test_only_what_closed_tasks_were_to_move_is_forgotten(
    clock: MockClock, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_rows, "_FORGOTTEN_AT_ONCE", 1)
    waiting = await scene.task()
    for task_id in [await scene.task() for _ in range(2)]:
        # No agent was told of it, so that it is closed at once.
        await scene.alice.post(f"/task/{task_id}/cancel")
    scene.up()
    done = await scene.task()
    scene.destination.succeed(done)
    await trio.sleep(MOMENT)
    counts = [await scene.relay.store.write(forget_items) for _ in range(4)]
    assert counts == [1, 1, 0, 0]
    rows = await scene.relay.store.read(lambda c: c.execute(select(tables.tasks.c.id, tables.tasks.c.closed)).all())
    assert {row.id: await items(scene, row.id) for row in rows} == {row.id: 0 if row.closed else 1 for row in rows}
    assert (await items(scene, waiting), await items(scene, done)) == (1, 1)
    # The agent of a task that is over is told to forget it some time later; its scope is looked at even then.
    await scene.relay.store.write(lambda connection: task_rows.change(connection, done, closed=True))
    assert await scene.relay.store.write(forget_items) == 1
    scope = await scene.relay.store.read(lambda connection: load_scope(connection, done))
    assert scope.source == ["/data"]
    shown = await scene.show(done)
    assert (shown["status"], shown["towpath"]["item_count"]) == ("SUCCEEDED", 1)


@pytest.mark.parametrize(("left", "said"), [(15.0, ""), (13.5, "ends in 13.5 days"), (-3.0, "ends in 0.0 days")])
def test_the_log_says_that_the_certificate_ends(left: float, said: str, caplog: pytest.LogCaptureFixture) -> None:
    server._warn_of_end(CertificateStatistics((), START + left * 86400, False), START)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(("left", "said"), [(366.0, ""), (200.0, "ends in 200 days"), (-3.0, "ends in 0 days")])
def test_the_log_says_that_the_authority_ends(left: float, said: str, caplog: pytest.LogCaptureFixture) -> None:
    server._warn_of_authoritys_end(CertificateStatistics((), START, True, START + left * 86400), START)
    assert said in caplog.text
    assert ("towpath-relay authority renew" in caplog.text) == bool(said)
    server._warn_of_authoritys_end(CertificateStatistics((), START, False), START)
    assert len(caplog.records) == bool(said)


async def test_a_clock_that_was_ahead_for_a_moment_puts_no_cleaning_off(
    autojump_clock: MockClock, relay_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    async def note(what: str, _work: Any) -> None:
        await trio.lowlevel.checkpoint()
        done.append(what)

    monkeypatch.setattr(server, "_attempt", note)
    now = [START + 10 * 365 * 86400]
    keys = SimpleNamespace(renew=print, renew_id_token_key=print)
    services = SimpleNamespace(clock=lambda: now[0], keys=keys, store=SimpleNamespace(write=print))
    certificate = SimpleNamespace(statistics=lambda: CertificateStatistics((), START + 10 * 365 * 86400, True))
    relay = cast(Any, SimpleNamespace(services=services, statistics=dict, certificate=certificate))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server._upkeep, relay, relay_settings)
        await trio.sleep(1)
        now[0] = START
        await trio.sleep(3 * server._CLEANING_INTERVAL)
        nursery.cancel_scope.cancel()
    assert done.count("forget expired tokens") == done.count("forget what closed tasks moved") == 4

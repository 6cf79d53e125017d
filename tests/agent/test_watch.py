"""Watch rules: what settles, where it goes, once and only once, whatever happens in between."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.collections import Collections, Marks
from agent.config.keys import CollectionConfig, WatchConfig
from agent.policy import Policy
from agent.storage.posix import open_root
from agent.transfer.deleting.remove import Removal
from agent.watch.ledger import Batch, Ledger
from agent.watch.rule import next_time
from agent.watch.service import LOOK_EVERY, RuleRunner, WatchService
from agent.watch.submitter import Outcome, SubmissionRefused
from protocol.errors import RetryLater
from tests.agent.test_engine_trouble import dig
from tests.agent.watch_scene import HERE, THERE
from tests.agent.watch_world import FakeRelay, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    # Files written by the tests are of the present; the rule's clock runs from there.
    made.now = datetime.now().timestamp()
    yield made
    made.ledger.close()


async def test_a_new_file_goes_once_and_a_changed_one_again(world: World) -> None:
    world.write("a.tif")
    world.write("b.part")
    assert await world.after(1) <= 10
    assert world.relay.files == []
    await world.after(11)
    assert world.relay.files == ["/a.tif"]
    for _ in range(3):
        await world.after(100)
    assert world.relay.submissions == 1
    world.write("a.tif", "changed")
    os.utime(world.root / "in" / "a.tif", (world.now, world.now))
    await world.after(1)
    await world.after(11)
    assert world.relay.files == ["/a.tif", "/a.tif"]


async def test_a_restart_between_writing_down_and_submitting_is_the_same_task(world: World) -> None:
    world.write("a")
    world.relay.trouble = RetryLater("The relay is away.")
    await world.after(20)
    (batch,) = world.ledger.open_batches("r")
    assert world.runner.status()["problem"] == "The relay is away."
    world.relay.trouble = None
    world.runner = world.start()
    await world.after(31)
    assert list(world.relay.tasks) == [batch.submission]
    world.runner = world.start()
    await world.after(100)
    assert len(world.relay.tasks) == 1


async def test_lost_notifications_cost_nothing(world: World) -> None:
    """No notification at all: whole scans find what is there, also what came while nobody looked."""
    for number in range(1200):
        world.write(f"f{number:04d}")
    world.runner = world.start()
    await world.after(30)
    await world.after(1)
    assert len(world.relay.files) == 1200
    assert len(world.relay.tasks) == 2


async def test_failed_tasks_are_submitted_anew_and_given_up_at_last(tmp_path: Path) -> None:
    world = World(tmp_path, retries=2)
    world.now = datetime.now().timestamp()
    world.write("a")
    world.relay.outcome = Outcome("FAILED", "The disk broke.", 0)
    for _ in range(10):
        await world.after(4000)
    assert len(world.relay.tasks) == 3
    assert world.ledger.counts("r") == {"failed": 1}
    assert "disk broke" in world.runner.status()["problem"]
    world.relay.outcome = Outcome("SUCCEEDED", "", 0)
    world.runner.look_now(retry=True)
    await world.after(1)
    await world.after(20)
    assert world.ledger.counts("r") == {"done": 1}
    assert world.runner.status()["problem"] == ""
    world.ledger.close()


async def test_what_the_relay_refuses_is_not_tried_for_ever(world: World) -> None:
    world.write("a")
    world.relay.trouble = SubmissionRefused("No such collection.")
    await world.after(20)
    await world.after(4000)
    assert world.relay.submissions == 1
    assert world.ledger.counts("r") == {"failed": 1}


@pytest.mark.parametrize("after", ["keep", "delete", "move"])
async def test_what_becomes_of_files_that_arrived(tmp_path: Path, after: str) -> None:
    world = World(tmp_path, after=after, moved_to="/in/done")
    world.now = datetime.now().timestamp()
    kept, changed = world.write("sub/kept"), world.write("changed")
    await world.after(20)
    world.write("changed", "meanwhile")
    os.utime(changed, (world.now + 18, world.now + 18))
    world.relay.outcome = Outcome("SUCCEEDED", "", 0)
    await world.after(20)
    assert world.ledger.counts("r") == {"done": 1}
    assert changed.read_text() == "meanwhile"
    assert kept.exists() == (after == "keep")
    assert (world.root / "in/done/sub/kept").exists() == (after == "move")
    await world.after(60)
    assert world.relay.files.count("/sub/kept") == 1
    assert "/done/sub/kept" not in world.relay.files
    world.ledger.close()


async def test_a_timed_rule_whose_files_cannot_be_written_down_does_not_wait_for_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, schedule="0 2 * * *")
    world.now = next_time("0 2 * * *", datetime.now().timestamp()) - 3600
    world.write("a")
    await world.after(0)

    def refuse(*_: object, **_named: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "hand_over", refuse)
        await world.after(3601)
    assert world.relay.files == []
    assert "full" in world.runner.status()["problem"]
    await world.after(60)
    assert world.relay.files == ["/a"]
    world.ledger.close()


async def test_a_ledger_that_cannot_be_read_ends_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next look is due is asked of it also when the folder cannot be looked at; it ended the agent."""

    def refuse(ledger: Ledger, rule: str) -> list[Batch]:
        raise sqlite3.OperationalError("disk I/O error")

    world.write("a")
    world.root.rename(world.root.with_name("away"))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "open_batches", refuse)
        assert await world.after(20) == LOOK_EVERY
    assert "disk I/O error" in world.runner.status()["problem"]
    world.root.with_name("away").rename(world.root)
    await world.after(20)
    assert world.relay.files == ["/a"]


class OutOfTheLoop:
    """A ledger that is not to be used where everything else would wait for it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)

        def called(*arguments: Any, **named: Any) -> Any:
            assert not trio.lowlevel.in_trio_task(), f"{name} is called in trio's thread"
            self.called.add(name)
            return method(*arguments, **named)

        return called


async def test_nobody_waits_for_the_ledger(tmp_path: Path) -> None:
    """Another rule that hands 200,000 files over has it for seconds, and so has a slow disk."""
    world = World(tmp_path, retries=1)
    ledger = world.runner._ledger = OutOfTheLoop(world.ledger)  # type: ignore[assignment]
    world.now = datetime.now().timestamp()
    world.write("a")
    world.relay.trouble = RetryLater("The relay is away.")
    await world.after(20)
    world.relay.trouble = None
    for status in ("FAILED", "FAILED", "SUCCEEDED"):
        world.relay.outcome = Outcome(status, "The disk broke.", 0)
        for _ in range(3):
            await world.after(4000)
        world.runner.look_now(retry=True)
        assert world.runner.status()["batches"]
    await world.after(4000)
    await world.after(4000)
    assert world.runner.status()["batches"] == {"done": 1}
    wanted = {"fresh", "hand_over", "open_batches", "submitted", "put_off", "again", "finished", "retry_failed"}
    assert ledger.called >= wanted  # type: ignore[attr-defined]
    world.ledger.close()


async def test_a_rule_without_threads_for_notifications_looks_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many are to be had as trio has already; and when there are more, it hears again. It ended the agent."""
    world = World(tmp_path, settle=0)
    world.write("a")
    monkeypatch.setattr("agent.watch.service.LOOK_EVERY", 0.0)
    world.runner = RuleRunner(
        world.rule, world.ledger, world.policy, world.collections, world.relay, lambda: datetime.now().timestamp()
    )
    refused: list[str] = []
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name.startswith("Trio"):
            start(thread)
            return
        refused.append(thread.name)
        raise RuntimeError("can't start new thread")

    async with trio.open_nursery() as nursery:
        with trio.fail_after(30):
            with monkeypatch.context() as shortage:
                shortage.setattr(threading.Thread, "start", none_left)
                nursery.start_soon(world.runner.run)
                while world.relay.files != ["/a"]:
                    await trio.sleep(0.05)
            assert refused and world.runner._observer is None
            while world.runner._observer is None:
                await trio.sleep(0.05)
            assert world.runner._observer.is_alive()
            monkeypatch.setattr("agent.watch.service.LOOK_EVERY", 60.0)
            await trio.sleep(1)
            world.write("b")
            while world.relay.files != ["/a", "/b"]:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    world.ledger.close()


async def test_a_very_deep_folder_ends_nothing(world: World) -> None:
    """Anybody who may write to the folder can make one; it ended the agent, and again after each start."""
    dig(world.root / "in", 1200)
    world.write("a")
    try:
        await world.after(20)
        assert world.runner.status()["problem"] == ""
        assert world.relay.files[0] == "/a"
    finally:
        with open_root(str(world.root / "in")) as root, root.open_directory(()) as top:
            # What tidies up after tests goes down by recursion, too.
            Removal().entry(top, top.lstat(b"d"), recursive=True)


async def test_files_stay_when_some_were_left_out(tmp_path: Path) -> None:
    world = World(tmp_path, after="delete", retries=0)
    world.now = datetime.now().timestamp()
    file = world.write("a")
    world.relay.outcome = Outcome("SUCCEEDED", "", 1)
    for _ in range(3):
        await world.after(30)
    assert file.exists()
    assert world.ledger.counts("r") == {"failed": 1}
    world.ledger.close()


async def test_a_disk_that_is_away_is_no_empty_folder(world: World) -> None:
    world.write("a")
    await world.after(1)
    world.root.rename(world.root.with_name("away"))
    await world.after(20)
    assert str(world.root) in world.runner.status()["problem"]
    assert world.relay.submissions == 0
    world.root.with_name("away").rename(world.root)
    await world.after(1)
    assert world.relay.files == ["/a"]


async def test_what_a_rule_brought_into_its_own_folder_is_not_new(tmp_path: Path) -> None:
    world = World(tmp_path, destination=HERE, template="/in/done/{path}")
    world.write("a")
    world.write("done/b")
    await world.after(20)
    assert world.relay.files == ["/in/done/a"]
    world.ledger.close()
    endless = World(tmp_path / "endless", destination=HERE, template="/in/{path}")
    endless.write("a")
    await endless.after(20)
    assert endless.relay.submissions == 0
    assert "take up again" in endless.runner.status()["problem"]
    endless.ledger.close()


async def test_a_folder_that_comes_late_or_again_is_heard_of(tmp_path: Path) -> None:
    """Real notifications: without them a file would be seen after a minute only."""
    world = World(tmp_path, settle=0)
    folder = world.root / "in"
    folder.rmdir()
    world.runner = RuleRunner(
        world.rule, world.ledger, world.policy, world.collections, world.relay, lambda: datetime.now().timestamp()
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.runner.run)
        with trio.fail_after(30):
            for name in ("a", "b"):
                while not world.runner.status()["problem"]:
                    await trio.sleep(0.05)
                folder.mkdir()
                world.runner.look_now(retry=False)
                while world.runner.status()["problem"]:
                    await trio.sleep(0.05)
                (folder / name).write_text("x")
                while f"/{name}" not in world.relay.files:
                    await trio.sleep(0.05)
                (folder / name).unlink()
                folder.rmdir()
        nursery.cancel_scope.cancel()
    world.ledger.close()


async def test_a_timed_rule_waits_for_its_time(tmp_path: Path) -> None:
    world = World(tmp_path, schedule="0 2 * * *")
    world.now = next_time("0 2 * * *", datetime.now().timestamp()) - 3600
    world.write("a")
    delay = await world.after(0)
    await world.after(1800)
    assert world.relay.submissions == 0
    assert delay <= 60
    await world.after(1801)
    assert world.relay.files == ["/a"]
    world.write("b")
    await world.after(1800)
    assert world.relay.files == ["/a"]
    world.runner.look_now(retry=False)
    await world.after(1)
    assert world.relay.files == ["/a", "/b"]
    world.ledger.close()


async def test_the_service_notices_files_and_new_rules(tmp_path: Path) -> None:
    """Real notifications, real time: a file that is there for half a second is submitted."""
    (tmp_path / "root" / "in").mkdir(parents=True)
    relay = FakeRelay()
    policy = Policy([CollectionConfig(id=HERE, name="Here", root=str(tmp_path / "root"))])
    service = WatchService(tmp_path, (), policy, Collections(Marks(None)), relay)
    rule = WatchConfig(name="r", collection=HERE, folder="/in", destination=THERE, settle=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        await trio.sleep(0)
        assert service.status() == []
        service.replace([rule])
        with trio.fail_after(30):
            while not service.status():
                await trio.sleep(0.05)
            (tmp_path / "root" / "in" / "a").write_text("x")
            while relay.files != ["/a"]:
                await trio.sleep(0.05)
        assert not service.look_now("other", retry=False)
        service.replace([])
        nursery.cancel_scope.cancel()

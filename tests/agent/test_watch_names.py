"""Files of one name that watch rules bring: none replaces another one."""

from __future__ import annotations

import dataclasses
import os
from datetime import datetime
from pathlib import Path

import pytest

from agent.watch.submitter import Outcome
from tests.agent.watch_world import World


@pytest.mark.parametrize("after", ["keep", "delete"])
async def test_files_of_one_name_from_several_folders_do_not_replace_one_another(tmp_path: Path, after: str) -> None:
    """By a template such as /{name}, at once or one after the other, and in another spelling."""
    world = World(tmp_path, after=after, template="/{name}", sync_level="size")
    world.now = datetime.now().timestamp()
    world.relay.outcome = Outcome("SUCCEEDED", "", 0)
    for name in ("a/scan", "b/scan"):
        world.write(name)
    for _ in range(3):
        await world.after(30)
    late = world.write("c/SCAN")
    os.utime(late, (world.now, world.now))
    for _ in range(3):
        await world.after(30)
    assert world.relay.files == ["/SCAN.2", "/scan", "/scan.1"]
    assert late.exists() == (after == "keep")
    assert world.relay.options == {("--sync-level", "size" if after == "keep" else "checksum")}
    # What has changed is the same file, and goes where it went; what came in the place of a deleted one is not.
    changed = world.write("b/scan", "changed")
    os.utime(changed, (world.now, world.now))
    for _ in range(3):
        await world.after(30)
    assert world.relay.files[-1] == ("/scan.1" if after == "keep" else "/scan.3")
    world.ledger.close()


async def _taken_away(world: World, text: str) -> None:
    """An instrument writes a file, always of the same name, and the rule takes it."""
    file = world.write("scan", text)
    os.utime(file, (world.now, world.now))
    for _ in range(3):
        await world.after(30)
    assert not file.exists()


async def test_a_file_that_comes_after_one_of_its_name_was_deleted_does_not_replace_it(tmp_path: Path) -> None:
    """An instrument that calls its files alike every day: what went before is all there is of it."""
    world = World(tmp_path, after="delete")
    world.now = datetime.now().timestamp()
    world.relay.outcome = Outcome("SUCCEEDED", "", 0)
    for text in ("first", "second", "third"):
        await _taken_away(world, text)
        # A rule of another name is about the same files.
        world.rule = dataclasses.replace(world.rule, name=f"after {text}")
        world.runner = world.start()
    assert world.relay.files == ["/scan", "/scan.1", "/scan.2"]
    world.ledger.close()


async def test_a_rule_of_another_name_brings_the_same_files_to_the_same_place(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.now = datetime.now().timestamp()
    world.write("scan")
    for name in ("r", "renamed"):
        world.rule = dataclasses.replace(world.rule, name=name)
        world.runner = world.start()
        for _ in range(2):
            await world.after(30)
    assert world.relay.files == ["/scan", "/scan"]
    world.ledger.close()


async def test_a_file_that_changed_before_it_was_to_be_deleted_goes_where_it_went(tmp_path: Path) -> None:
    world = World(tmp_path, after="delete")
    world.now = datetime.now().timestamp()
    file = world.write("scan")
    await world.after(20)
    file.write_text("changed")
    os.utime(file, (world.now, world.now))
    world.relay.outcome = Outcome("SUCCEEDED", "", 0)
    for _ in range(3):
        await world.after(30)
    assert not file.exists()
    assert world.relay.files == ["/scan", "/scan"]
    world.ledger.close()


async def test_a_moved_file_does_not_replace_one_that_was_moved_before(tmp_path: Path) -> None:
    """An instrument that calls its files alike every day."""
    world = World(tmp_path, after="move", moved_to="/done")
    world.now = datetime.now().timestamp()
    world.relay.outcome = Outcome("SUCCEEDED", "", 0)
    for text in ("first", "second", "third"):
        await _taken_away(world, text)
    assert sorted(path.read_text() for path in (world.root / "done").iterdir()) == ["first", "second", "third"]
    world.ledger.close()

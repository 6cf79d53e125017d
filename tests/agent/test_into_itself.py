"""A folder copied into itself, by other ways than its name: through collections that overlap, or through links."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.storage.enclosing import enclosing
from agent.storage.memory import MemoryRoot
from agent.storage.posix import open_root
from protocol.control import TaskItem, TaskOptions, TaskOrder
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path, skipped

__all__ = ["quick_path"]

FOLLOWING = TaskOptions(recursive_symlinks="copy")
MIRROR = TaskOptions(delete_destination_extra=True)


class OtherMachine(Engine):
    """The source is another agent's, whose numbers of disks and files say nothing here."""

    def order(self) -> TaskOrder:
        order = super().order()
        assert order.source is not None
        return msgspec.structs.replace(order, source=msgspec.structs.replace(order.source, node_id="m"))


def item(source: str, destination: str, *, recursive: bool | None = True) -> TaskItem:
    return TaskItem(source_path=source, destination_path=destination, recursive=recursive)


def fill(folder: Path) -> None:
    (folder / "below").mkdir(parents=True)
    for name in ("one", "two", "below/three"):
        (folder / name).write_bytes(name.encode() * 1000)
    (folder / "large").write_bytes(os.urandom(1 << 21))


async def refused(engine: Engine, names: list[str], code: str = "INTO_ITSELF") -> None:
    """Run it: these fail, and nothing else happens to the source."""
    before = contents(engine.source)
    observed = await engine.run(10)
    assert (observed.state, skipped(engine)) == ("FAILED", dict.fromkeys(names, code)), observed
    assert contents(engine.source) == before
    assert any("would grow without end" in event.details for event in engine.events if event.code == code)


@pytest.mark.parametrize("options", [CHECKED, MIRROR, FOLLOWING])
@pytest.mark.parametrize("to", ["/", "/new", "/new/er"])
async def test_through_a_collection_that_lies_in_the_other_one(quick_path: Path, options: TaskOptions, to: str) -> None:
    engine = Engine(quick_path, options, [item("/", to)])
    fill(engine.source)
    engine.destination = engine.source / "below" / "deep"
    engine.destination.mkdir()
    await refused(engine, [""])


@pytest.mark.parametrize("options", [CHECKED, MIRROR, FOLLOWING])
async def test_onto_itself(quick_path: Path, options: TaskOptions) -> None:
    """Through another collection with the same folder, one above it, and a link."""
    for number, (root, path) in enumerate([("source", "/"), (".", "/source"), (".", "/link"), (".", "/link/new")]):
        engine = Engine(quick_path / str(number), options, [item("/", path)])
        fill(engine.source)
        engine.destination = engine.base / root
        (engine.base / "link").symlink_to("source")
        await refused(engine, [""])


async def test_a_file_onto_itself_stays_what_it_is(quick_path: Path) -> None:
    items = [item(f"/{name}", f"/{name}", recursive=None) for name in ("one", "large")]
    engine = Engine(quick_path, items=items)
    fill(engine.source)
    before = contents(engine.source)
    engine.destination = engine.source
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.source) == before


async def test_a_link_to_a_folder_above_the_destination_is_not_followed(quick_path: Path) -> None:
    """The rest arrives."""
    engine = Engine(quick_path, FOLLOWING, [item("/source", "/out")])
    fill(engine.source)
    (engine.source / "up").symlink_to("..")
    engine.destination = engine.base / "public"
    engine.destination.mkdir()
    engine.source = engine.base
    observed = await engine.run(10)
    assert (observed.state, skipped(engine)) == ("FAILED", {"source/up": "INTO_ITSELF"}), observed
    arrived = contents(engine.destination / "out")
    assert set(arrived) == {"one", "two", "below", "below/three", "large"}


async def test_a_copy_out_of_a_folder_into_the_one_above_arrives(quick_path: Path) -> None:
    engine = Engine(quick_path, items=[item("/", "/")])
    fill(engine.source)
    engine.destination = engine.base
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.base / "below") == contents(engine.source / "below")


async def test_numbers_of_another_machine_say_nothing(quick_path: Path) -> None:
    engine = OtherMachine(quick_path, items=[item("/", "/")])
    fill(engine.source)
    before = contents(engine.source)
    engine.destination = engine.source
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.source) == before


def test_folders_enclose_what_lies_in_them(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    with open_root(str(tmp_path)) as root, root.open_directory((b"link",)) as handle:
        found = enclosing(handle)
    expected = [tmp_path / "a" / "b", *(tmp_path / "a" / "b").resolve().parents]
    assert found == {(path.stat().st_dev, path.stat().st_ino) for path in expected}
    with MemoryRoot() as memory, memory.open_directory(()) as handle:
        assert enclosing(handle) == {memory.identity()}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["keep", "copy"])
async def test_a_mirror_into_a_folder_above_does_not_delete_its_source(
    quick_path: Path, depth: int, policy: Any
) -> None:
    """Else the copy would be all that is left, and less than that where filters leave something out."""
    options = msgspec.structs.replace(MIRROR, recursive_symlinks=policy)
    engine = Engine(quick_path, options, [item("/", "/")])
    engine.destination = quick_path / "above"
    engine.source = engine.destination.joinpath(*["on-the-way", "source"][-depth:])
    fill(engine.source)
    (engine.destination / "extra").write_bytes(b"extra")
    (engine.source.parent / "beside").write_bytes(b"extra")
    before = contents(engine.source)
    observed = await engine.run()
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 2), observed
    assert contents(engine.source) == before
    names = {path.name for path in engine.destination.iterdir()}
    assert names == {"one", "two", "below", "large", engine.source.relative_to(engine.destination).parts[0]}
    (told,) = [event.details for event in engine.events if event.code == "EXTRA_NOT_DELETED"]
    assert "the very folder that the task copies" in told


async def test_a_folder_of_that_number_on_another_machine_is_deleted(quick_path: Path) -> None:
    engine = OtherMachine(quick_path, MIRROR, [item("/", "/")])
    engine.destination = quick_path / "above"
    engine.source = engine.destination / "source"
    fill(engine.source)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert sorted(path.name for path in engine.destination.iterdir()) == ["below", "large", "one", "two"]

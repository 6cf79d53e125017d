"""Files sent to what is a folder, or is written as one: refused, with the path that was meant; nothing is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.transfer.books.manifest import SkippedRow, read_page
from protocol.control import TaskItem
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path, skipped

__all__ = ["quick_path"]


@pytest.mark.parametrize("recursive", [None, False])
@pytest.mark.parametrize(
    ("to", "meant"),
    [
        ("/results/", "/results/a b.dat"),
        ("/there/", "/there/a b.dat"),
        ("/there", "/there/a b.dat"),
        ("/", "/a b.dat"),
        ("/~", "/a b.dat"),
        ("/there/..", "/a b.dat"),
    ],
)
async def test_the_path_that_was_meant_is_named(quick_path: Path, to: str, meant: str, recursive: bool | None) -> None:
    items = [TaskItem(source_path="/a b.dat", destination_path=to, recursive=recursive)]
    items.append(TaskItem(source_path="/other", destination_path="/other", recursive=recursive))
    engine = Engine(quick_path, CHECKED, items)
    for name in ("a b.dat", "other"):
        (engine.source / name).write_bytes(name.encode())
    (engine.destination / "there").mkdir()
    observed = await engine.run(10)
    assert (observed.state, skipped(engine)) == ("FAILED", {"a b.dat": "IS_A_DIRECTORY"})
    (row,) = read_page(engine.state / "skipped.manifest", SkippedRow, None, 10, complete=True).rows
    assert row.details.endswith(f"write the whole path of the new file, such as {meant}."), row.details
    assert contents(engine.destination) == {"other": b"other", "there": "folder"}


async def test_two_files_sent_to_a_folder_that_is_not_there_never_replace_each_other(quick_path: Path) -> None:
    """Both had its name in turn, and the second one took the place of the first."""
    for name in ("first", "second"):
        engine = Engine(quick_path / name, CHECKED, [TaskItem(source_path=f"/{name}", destination_path="/results/")])
        (engine.source / name).write_bytes(name.encode())
        assert (await engine.run(10)).state == "FAILED"
        assert not (engine.destination / "results").exists()

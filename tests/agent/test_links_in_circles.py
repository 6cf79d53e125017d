"""Links that are followed and lead back to a folder above them."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.transfer.books.manifest import SkippedRow, read_page
from protocol.control import TaskOptions
from tests.agent.engine_inside import Engine, contents, quick_path, tree

__all__ = ["quick_path"]


@pytest.mark.parametrize("target", ["..", "../..", "."])
async def test_a_link_to_a_folder_above_it_fails_in_words_and_the_rest_arrives(quick_path: Path, target: str) -> None:
    engine = Engine(quick_path, TaskOptions(recursive_symlinks="copy"))
    tree(engine.source, ["a/b/file", "a/other"])
    (engine.source / "a/b/circle").symlink_to(target)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed, observed.counters.files) == ("FAILED", 1, 2)
    assert set(contents(engine.destination)) == {"a", "a/b", "a/b/file", "a/other"}
    (row,) = read_page(engine.state / "skipped.manifest", SkippedRow, None, 10, complete=True).rows
    assert (row.source, row.code) == (b"a/b/circle", "SYMLINK_LOOP")
    assert "comes to no end" in row.details

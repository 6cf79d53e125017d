"""What is done about one entry of the source, by what stands in its place at the destination."""

from __future__ import annotations

import pytest

from agent.storage.node import Kind, Node
from agent.transfer.basis.compare import Decision, block_count, block_size, decide, decide_link
from protocol.control import TaskOptions
from protocol.session import DIRECTORY, FILE, OTHER, SYMLINK, Row

MIB = 1 << 20
SECOND = 10**9


def row(kind: int, size: int = 5, mtime_ns: int = 7 * SECOND, target: bytes | None = None) -> Row:
    return Row(b"x", kind, size, mtime_ns, 0, 1, 1, 0o644, target)


def node(kind: Kind, size: int = 5, mtime_ns: int = 7 * SECOND) -> Node:
    return Node(b"x", kind, size, mtime_ns, 0, 1, 1, 0o644, 0, 0, 1)


KINDS: list[Kind | None] = [None, "file", "dir", "symlink", "pipe", "chr"]
KEEP, IGNORE, COPY = (TaskOptions(recursive_symlinks=how) for how in ("keep", "ignore", "copy"))


@pytest.mark.parametrize(
    ("source", "options", "decisions"),
    [
        (row(DIRECTORY), KEEP, ["directory", "conflict", "directory", "directory", "conflict", "conflict"]),
        (row(FILE), KEEP, ["copy", "copy", "conflict", "copy", "copy", "copy"]),
        (row(SYMLINK, target=b"t"), KEEP, ["link", "link", "conflict", "link", "link", "link"]),
        (row(SYMLINK, target=b"t"), IGNORE, ["ignore"] * 6),
        # Links that are followed come as what they lead to: one that leads nowhere is left out, and what has no target
        # was not looked at yet.
        (row(SYMLINK, target=b"t"), COPY, ["ignore"] * 6),
        (row(SYMLINK), COPY, ["link", "link", "conflict", "link", "link", "link"]),
        (row(SYMLINK), KEEP, ["link", "link", "conflict", "link", "link", "link"]),
        (row(OTHER), KEEP, ["unsupported"] * 6),
        (row(9), KEEP, ["unsupported"] * 6),
    ],
)
def test_what_stands_in_an_entrys_place_decides(source: Row, options: TaskOptions, decisions: list[Decision]) -> None:
    assert [decide(source, kind and node(kind), options) for kind in KINDS] == decisions


@pytest.mark.parametrize(
    ("size", "mtime_ns", "decisions"),
    [
        # Without a sync level, then levels 0 to 3; the source has 5 bytes, modified in second 7.
        (5, 7 * SECOND, ["copy", "skip", "skip", "skip", "compare digests"]),
        (4, 7 * SECOND, ["copy", "skip", "copy", "copy", "copy"]),
        (6, 7 * SECOND, ["copy", "skip", "copy", "copy", "copy"]),
        (5, 7 * SECOND - 1, ["copy", "skip", "skip", "copy", "compare digests"]),
        # Parts of a second are no difference, and a newer file at the destination is left.
        (5, 8 * SECOND - 1, ["copy", "skip", "skip", "skip", "compare digests"]),
        (5, 9 * SECOND, ["copy", "skip", "skip", "skip", "compare digests"]),
    ],
)
def test_sync_levels(size: int, mtime_ns: int, decisions: list[Decision]) -> None:
    existing = node("file", size, mtime_ns)
    source = row(FILE, mtime_ns=7 * SECOND + SECOND // 2)
    levels = [None, 0, 1, 2, 3]
    assert [decide(source, existing, TaskOptions(sync_level=level)) for level in levels] == decisions
    # They say nothing about what is no file, but for the one that leaves alone whatever has the name.
    kept = ["copy", "skip", "copy", "copy", "copy"]
    for kind in KINDS[3:]:
        existing = kind and node(kind, size, mtime_ns)
        assert [decide(source, existing, TaskOptions(sync_level=level)) for level in levels] == kept, kind


def test_the_level_that_leaves_alone_what_is_there_holds_for_links() -> None:
    link = row(SYMLINK, target=b"t")
    for level, there in ((None, "link"), (0, "skip"), (1, "link"), (2, "link"), (3, "link")):
        options = TaskOptions(recursive_symlinks="keep", sync_level=level)
        decisions = [decide(link, kind and node(kind), options) for kind in KINDS]
        assert decisions == ["link", there, "conflict", there, there, there], level
        assert decisions == [decide_link(kind and node(kind), options) for kind in KINDS]


def test_blocks_grow_when_there_would_be_too_many() -> None:
    most = 64 * 1024
    assert [block_size(size) for size in (0, 1, most * MIB, (most + 1) * MIB - 1)] == [MIB] * 4
    assert block_size((most + 1) * MIB) == 2 * MIB
    assert block_size((2 * most + 2) * MIB) == 4 * MIB
    assert block_size(1 << 62) == 16 * MIB
    assert [block_count(size, 10) for size in (0, 1, 10, 11)] == [0, 1, 1, 2]

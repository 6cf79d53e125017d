"""Every kind of storage, and small things that tests of all of them do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.storage.base import (
    Directory,
    Root,
)
from agent.storage.faulty import FaultyRoot
from agent.storage.hiding import offered
from agent.storage.memory import MemoryRoot
from agent.storage.posix import open_root

DAY = 86_400_000_000_000
OLD = 1_000_000_000 * 1_000_000_000 + 123_456_789


@pytest.fixture(params=["posix", "memory", "wrapped", "hiding"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Root]:
    if request.param in ("posix", "hiding"):
        (tmp_path / "root").mkdir()
        made: Root = offered(open_root(str(tmp_path / "root")), hidden=request.param == "posix")
    else:
        if not hasattr(os, "memfd_create"):
            pytest.skip("memory storage needs memfd_create")
        # The place that absolute symlinks name is the same for all.
        made = MemoryRoot(os.fsencode(tmp_path / "root"))
        if request.param == "wrapped":
            made = FaultyRoot(made)
    with made:
        yield made


@pytest.fixture()
def top(root: Root) -> Iterator[Directory]:
    with root.open_directory(()) as directory:
        yield directory


def write(root: Root, directory: Directory, name: bytes, content: bytes = b"") -> None:
    fd = directory.create_temporary(name)
    if content:
        assert root.pwrite(fd, content, 0) == len(content)
    root.close_file(fd)


def read(root: Root, fd: int) -> bytes:
    buffer = bytearray(4096)
    size = root.preadv(fd, [buffer], 0)
    root.close_file(fd)
    return bytes(buffer[:size])


def content(root: Root, directory: Directory, name: bytes, *, follow: bool = False) -> bytes:
    return read(root, directory.open_read(name, follow=follow))


def names(directory: Directory) -> list[bytes]:
    return sorted(node.name for node in directory.scan())


def code(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno

"""The count of received bytes, whose file may be on a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from agent.transfer.course import received
from agent.transfer.course.received import ReceivedCounter
from tests.agent.small_disks import memory_disk, needs_root


@pytest.mark.parametrize("file_system", ["tmpfs", "btrfs"])
def test_it_is_there_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str) -> None:
    monkeypatch.setattr(received, "file_system_of", lambda _: file_system)
    first = ReceivedCounter(tmp_path / "received")
    first.add(5)
    first.add(1 << 40)
    # Not closed: it was killed.
    second = ReceivedCounter(tmp_path / "received")
    assert second.value == 5 + (1 << 40)
    second.reset()
    third = ReceivedCounter(tmp_path / "received")
    assert third.value == 0
    for counter in (first, second, third):
        counter.close()
        counter.close()


def test_a_disk_that_fills_up_costs_the_count_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "file_system_of", lambda _: "btrfs")
    counter = ReceivedCounter(tmp_path / "received")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        counter.add(7)
    assert counter.value == 7
    counter.add(1)
    counter.close()
    assert ReceivedCounter(tmp_path / "received").value == 8


@pytest.mark.parametrize(
    ("file_system", "written"),
    [
        ("tmpfs", False),
        ("ramfs", False),
        ("ext4", False),
        ("xfs", False),
        ("btrfs", True),
        ("zfs", True),
        ("nfs4", True),
    ],
)
def test_it_costs_a_call_only_where_a_page_of_memory_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str, written: bool
) -> None:
    monkeypatch.setattr(received, "file_system_of", lambda _: file_system)
    with closing(ReceivedCounter(tmp_path / "received")) as counter:
        calls: list[object] = []
        write = os.pwrite
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", lambda *arguments: calls.append(arguments) or write(*arguments))
            counter.add(7)
    assert len(calls) == written
    assert (tmp_path / "received").stat().st_mode & 0o777 == 0o600
    with closing(ReceivedCounter(tmp_path / "received")) as counter:
        assert counter.value == 7


def test_a_count_that_was_not_written_whole_is_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(OSError, match="space"):
        ReceivedCounter(tmp_path / "received")


@needs_root
def test_a_full_disk_is_an_error_and_kills_nobody(tmp_path: Path) -> None:
    """Stored to a hole of a memory-mapped file, it killed the worker."""
    code = (
        "import errno, sys; from pathlib import Path; from agent.transfer.course.received import ReceivedCounter\n"
        "try: ReceivedCounter(Path(sys.argv[1])).add(1)\n"
        "except OSError as error: sys.exit(3 if error.errno == errno.ENOSPC else 4)\n"
    )
    with memory_disk(tmp_path / "full", 1):
        filler = os.open(tmp_path / "full" / "filler", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="space"):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "full" / "received")], check=False)
    assert done.returncode == 3

"""Quotas of real file systems that are used up in the middle of a task: waited for, in words, and gone on from."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from protocol.control import TaskOptions
from tests.agent.engine_inside import Engine, contents
from tests.agent.seen_trouble import Seen
from tests.agent.small_disks import MIB, Disk, needs_root, unmounting

PROJECT = "42"
pytestmark = needs_root


def tool(*arguments: object) -> None:
    try:
        done = subprocess.run([str(argument) for argument in arguments], capture_output=True)
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not installed")
    if done.returncode:
        pytest.skip(f"quotas do not work here: {done.stderr.decode().strip()}")


def of_a_subvolume(disk: Path, folder: Path) -> Callable[[], None]:
    """Btrfs; what takes the limit away."""
    tool("btrfs", "quota", "enable", disk)
    tool("btrfs", "subvolume", "create", folder)
    tool("btrfs", "qgroup", "limit", 6 * MIB, folder)
    return lambda: tool("btrfs", "qgroup", "limit", "none", folder)


def of_a_project(disk: Path, folder: Path) -> Callable[[], None]:
    """XFS; what takes the limit away."""

    def limit(size: str) -> None:
        tool("xfs_quota", "-x", "-c", f"limit -p bhard={size} {PROJECT}", disk)

    folder.mkdir()
    tool("xfs_quota", "-x", "-c", f"project -s -p {folder} {PROJECT}", disk)
    limit("6m")
    return lambda: limit("0")


@pytest.mark.parametrize(
    ("kind", "options", "set_limit", "code", "words"),
    [
        ("btrfs", "loop", of_a_subvolume, "QUOTA_EXCEEDED", "quota is used up"),
        # A project that is full is a full disk to this file system.
        ("xfs", "loop,prjquota", of_a_project, "NO_SPACE", "disk is full"),
    ],
    ids=["btrfs", "xfs"],
)
async def test_a_real_quota_is_waited_for(
    tmp_path: Path,
    kind: str,
    options: str,
    set_limit: Callable[[Path, Path], Callable[[], None]],
    code: str,
    words: str,
) -> None:
    place = tmp_path / "disk"
    disk = Disk(tmp_path / "image", kind)
    with unmounting(place):
        disk.mount(place, options)
        folder = place / "folder"
        seen = Seen(code, set_limit(place, folder))
        engine = Engine(tmp_path, TaskOptions(verify_checksum=True), on_report=seen)
        engine.destination = folder
        for number in range(4):
            (engine.source / f"large-{number}").write_bytes(os.urandom(4 * MIB))
        observed = await engine.run(60)
        assert observed.state == "SUCCEEDED", observed
        assert contents(folder) == contents(engine.source)
        seen.check(engine, "destination owner", words)
        print(f"{kind}: {[event.code for event in engine.events]}, then {observed.counters.bytes_transferred} bytes")

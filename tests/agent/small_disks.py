"""Real file systems of this kernel on small disks in files (loop devices), for tests that run as root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.config.keys import CollectionConfig
from agent.storage.mounts import Mark

MIB = 1024 * 1024
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mounts")
# The smallest that each makes, in MiB.
LEAST = {"ext4": 64, "xfs": 300, "btrfs": 120}
# Of a disk that is mounted nowhere here.
ELSEWHERE = Mark("/mnt/disk", "ext4", 2, "a" * 32)
# The collection of `config_for`.
ID = "00000000-0000-4000-8000-0000000000a1"


def config_for(root: Path) -> CollectionConfig:
    return CollectionConfig(id=ID, name="Data", root=str(root))


class Disk:
    """A small disk in a file."""

    def __init__(self, image: Path, kind: str = "ext4", megabytes: int = 0) -> None:
        self.image = image
        with image.open("wb") as file:
            file.truncate(max(LEAST[kind], megabytes) * MIB)
        try:
            made = subprocess.run([f"mkfs.{kind}", "-q", image], capture_output=True)
        except FileNotFoundError:
            pytest.skip(f"mkfs.{kind} is not installed")
        assert made.returncode == 0, made.stderr

    def mount(self, place: Path, options: str = "loop") -> None:
        """Skips the test, with the system's reason, where it cannot be mounted like this."""
        done = subprocess.run(["mount", "-o", options, self.image, place], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot be mounted here ({options}): {done.stderr.decode().strip()}")


@contextmanager
def unmounting(place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    try:
        yield
    finally:
        while os.path.ismount(place):
            subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def memory_disk(place: Path, megabytes: int) -> Iterator[None]:
    """A small file system in memory; skips the test where this process may not mount."""
    place.mkdir(exist_ok=True)
    with _mounted(place, "-t", "tmpfs", "-o", f"size={megabytes}m", "none"):
        yield


@contextmanager
def bound(source: Path, place: Path) -> Iterator[None]:
    """A folder at another place, too; skips the test where this process may not mount."""
    with _mounted(place, "--bind", str(source)):
        yield


@contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[None]:
    done = subprocess.run(["mount", *arguments, place], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)

"""Two disks in one place whose inodes and attributes tell nothing of which is which: the UUID of the volume does, where
the kernel or udev says it to everybody."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.collections import MARKS_FILE, Collections, Marks
from agent.config.keys import CollectionConfig
from agent.storage import mounts
from agent.storage.disks import DISK_MISSING, DISK_REPLACED, DiskAway, verdict
from agent.storage.mounts import Mark, Mount
from agent.storage.posix import open_root
from agent.storage.unavailable import CollectionUnavailable
from protocol.errors import NeedsPerson
from tests.agent.small_disks import Disk, needs_root, unmounting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell this otherwise, or not at all")
ID = "00000000-0000-4000-8000-0000000000a1"
STICK = Mark("/data/stick", "exfat", 0, "uuid 1234-ABCD")


@pytest.fixture
def udev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What udev says from now on of the file system on the device that ``tmp_path`` is on; nothing if empty."""
    folder = tmp_path / "udev"
    folder.mkdir()
    monkeypatch.setattr(mounts, "_UDEV", str(folder))
    device = os.stat(tmp_path).st_dev
    if not os.major(device):
        # A file system without a device, as in containers.
        monkeypatch.setattr(os, "major", lambda _: 8)

    def say(uuid: str) -> None:
        entry = f"S:disk/by-label/X\nE:ID_FS_TYPE=exfat\nE:ID_FS_UUID={uuid}\nE:ID_FS_UUID_ENC={uuid}\n" if uuid else ""
        (folder / f"b{os.major(device)}:{os.minor(device)}").write_text(entry)

    return say


@pytest.fixture
def exfat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CollectionConfig:
    """A collection that seems to be on exFAT: no attributes, no lasting inodes, no answer of the kernel."""

    def refuse(number: int) -> Callable[..., bytes]:
        def refused(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        return refused

    monkeypatch.setattr(os, "getxattr", refuse(errno.ENOTSUP))
    monkeypatch.setattr(os, "setxattr", refuse(errno.ENOTSUP))
    monkeypatch.setattr("fcntl.ioctl", refuse(errno.ENOTTY))
    monkeypatch.setattr(mounts, "mount_of", lambda *_: Mount("exfat", str(tmp_path)))
    (tmp_path / "root").mkdir()
    return CollectionConfig(id=ID, name="Stick", root=str(tmp_path / "root"))


def test_another_exfat_disk_is_not_taken_for_the_one_that_was_set_up(
    tmp_path: Path, exfat: CollectionConfig, udev: Callable[[str], None]
) -> None:
    udev("1234-ABCD")
    with open_root(exfat.root) as root:
        mark = root.place_marker()
    assert mark == Mark(str(tmp_path), "exfat", 0, "uuid 1234-ABCD")
    with open_root(exfat.root, mark) as root:
        root.check_original()
    with Collections(Marks(tmp_path / MARKS_FILE)).using(exfat):
        pass
    udev("9999-0000")
    with pytest.raises(NeedsPerson, match="volume it was on when it was set up, with the UUID 1234-ABCD"):
        open_root(exfat.root, mark)
    with (
        pytest.raises(CollectionUnavailable, match="UUID 1234-ABCD"),
        Collections(Marks(tmp_path / MARKS_FILE)).using(exfat),
    ):
        pass
    # Whoever is not told now cannot say that it is another one.
    udev("")
    with open_root(exfat.root, mark) as root:
        root.check_original()


def test_a_mark_of_before_gets_the_uuid_when_it_is_known(
    tmp_path: Path, exfat: CollectionConfig, udev: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Until then it is said, once, that another disk would not be noticed."""
    kept = tmp_path / MARKS_FILE
    for _ in range(2):
        with Collections(Marks(kept)).using(exfat):
            pass
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"Another disk of type exfat mounted at {tmp_path} ")
    assert json.loads(kept.read_bytes())[ID]["mark"]["marker"] == ""
    udev("1234-ABCD")
    with Collections(Marks(kept)).using(exfat):
        pass
    assert json.loads(kept.read_bytes())[ID]["mark"]["marker"] == "uuid 1234-ABCD"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, ""),
        ({"marker": "uuid 9999-0000"}, DISK_REPLACED),
        ({"marker": ""}, ""),
        ({"mount_point": "/", "file_system": "ext4", "marker": ""}, DISK_MISSING),
        ({"mount_point": "/mnt"}, DISK_MISSING),
        ({"file_system": "vfat", "marker": "volume 1234-ABCD"}, DISK_REPLACED),
    ],
)
@pytest.mark.parametrize("file_system", ["exfat", "fuseblk"])
def test_of_two_disks_below_a_root_the_uuid_tells(file_system: str, changes: dict[str, object], code: str) -> None:
    expected = dataclasses.replace(STICK, file_system=file_system)
    assert verdict(expected, dataclasses.replace(expected, **changes)) == code  # type: ignore[arg-type]


@pytest.mark.parametrize("entry", ["", "E:ID_FS_TYPE=exfat\n", "E:ID_FS_UUID=\n", "E:ID_FS_UUID=" + "1" * 65 + "\n"])
def test_what_udev_does_not_say_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setattr(mounts, "_UDEV", str(tmp_path))
    (tmp_path / "b8:17").write_text(entry)
    for device in ("8:17", "8:18", "0:17", "", "../8:17"):
        assert mounts.uuid_of_device(device) == ""
    (tmp_path / "b8:17").write_text(entry + "E:ID_FS_UUID=12-AB\n")
    assert mounts.uuid_of_device("8:17") == "uuid 12-AB"


@needs_root
@pytest.mark.parametrize(("kind", "options"), [("ext4", "loop"), ("ntfs-3g", "loop")])
def test_two_real_disks_below_a_read_only_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str
) -> None:
    """No marker may be placed. The kernel tells the UUID of ext4; of NTFS, with its driver outside the kernel, udev,
    which is played."""
    if kind == "ntfs-3g" and not shutil.which("mkntfs"):
        pytest.skip("needs mkntfs (ntfs-3g)")
    udev = tmp_path / "udev"
    udev.mkdir()
    monkeypatch.setattr(mounts, "_UDEV", str(udev))
    place = tmp_path / "root" / "disk"
    place.parent.mkdir()
    config = CollectionConfig(id=ID, name="Disks", root=str(place.parent), read_only=True)

    def mount(name: str) -> None:
        if kind == "ext4":
            images[name].mount(place, options)
            return
        done = subprocess.run(["mount", "-t", kind, "-o", options, images[name], place], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot be mounted here: {done.stderr.decode().strip()}")
        device = os.stat(place).st_dev
        (udev / f"b{os.major(device)}:{os.minor(device)}").write_text(f"E:ID_FS_UUID={name}\n")

    images: dict[str, object] = {}
    for name in ("one", "other"):
        if kind == "ext4":
            images[name] = Disk(tmp_path / name)
            continue
        images[name] = tmp_path / name
        with (tmp_path / name).open("wb") as file:
            file.truncate(8 << 20)
        made = subprocess.run(["mkntfs", "-q", "-F", str(tmp_path / name)], capture_output=True)
        if made.returncode:
            pytest.skip("mkntfs does not work here")
    marks = Marks(tmp_path / MARKS_FILE)
    with unmounting(place):
        mount("one")
        with Collections(marks).using(config):
            pass
        (disk,) = marks.disks(config)
        assert disk.mark.marker.startswith("uuid "), disk
        with open_root(config.root, disks=[disk]) as root:
            root.open_directory((b"disk",)).close()
            subprocess.run(["umount", "--lazy", place], check=True)
            mount("other")
            with pytest.raises(DiskAway) as caught:
                root.open_directory((b"disk",))
            assert caught.value.code == DISK_REPLACED
            subprocess.run(["umount", "--lazy", place], check=True)
            mount("one")
            root.open_directory((b"disk",)).close()

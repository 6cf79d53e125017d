"""Access lists and capabilities on real file systems: never taken over, counted and told where attributes are wanted,
and no way for a file to be open to more accounts at the destination than at the source."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from agent.storage import attributes
from protocol.control import TaskItem
from tests.agent.engine_inside import CHECKED, Engine, contents
from tests.agent.small_disks import Disk, needs_root, unmounting

WANTED = msgspec.structs.replace(CHECKED, preserve_xattrs=True)
ACCESS, DEFAULT, CAPABILITY = "system.posix_acl_access", "system.posix_acl_default", "security.capability"
# Open files without questions, for every account (CAP_DAC_OVERRIDE, effective).
OVERRIDE = bytes.fromhex("0100000202000000000000000000000000000000")
# One that is no account of this machine.
SOMEBODY = 54321


def access_list(user: int, somebody: int, group: int, mask: int, other: int) -> bytes:
    """As setfacl makes them: of the owner, a named user, the owning group, the mask, all others."""
    rows = [(0x01, user, 2**32 - 1), (0x02, somebody, SOMEBODY), (0x04, group, 2**32 - 1)]
    rows += [(0x10, mask, 2**32 - 1), (0x20, other, 2**32 - 1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


@contextmanager
def on(kind: str, base: Path) -> Iterator[Engine]:
    """An engine with both ends on one disk of this kind."""
    place = base / "disk"
    disk = Disk(base / "image", kind)
    with unmounting(place):
        disk.mount(place)
        engine = Engine(base, WANTED)
        engine.source, engine.destination = place / "source", place / "destination"
        for folder in (engine.source, engine.destination):
            folder.mkdir()
        yield engine


def foreign(path: Path) -> set[str]:
    """What a file has that only the system's own programs understand."""
    return {name for name in os.listxattr(path) if not name.startswith(("user.", "security.selinux"))}


def fill(engine: Engine) -> None:
    (engine.source / "folder").mkdir()
    names = ("listed", "folder/also", "capable", "large", "plain")
    for name in names:
        (engine.source / name).write_bytes(os.urandom(3_000_000 if name == "large" else 100))
        os.setxattr(engine.source / name, "user.origin", name.encode())
    for name in ("listed", "folder/also", "large"):
        os.setxattr(engine.source / name, ACCESS, access_list(6, 4, 0, 4, 0))
    os.setxattr(engine.source / "folder", DEFAULT, access_list(7, 7, 0, 7, 0))
    os.setxattr(engine.source / "capable", CAPABILITY, OVERRIDE)


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_what_grants_rights_is_counted_and_never_taken_over(tmp_path: Path, kind: str) -> None:
    with on(kind, tmp_path) as engine:
        fill(engine)
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert contents(engine.destination) == contents(engine.source)
        there = [engine.destination, *engine.destination.rglob("*")]
        assert [path for path in there if foreign(path)] == []
        assert all(os.getxattr(path, "user.origin") for path in there if path.is_file())
        # Three files and a folder with lists, one program with capabilities.
        assert observed.counters.xattrs_left_out == 5
        (event,) = (event for event in engine.events if event.code == "ATTRIBUTES_LEFT_OUT")
        assert "access list or the capabilities" in event.details
        print(f"{kind}: {len(there)} files and folders, {observed.counters.xattrs_left_out} counted, none taken over")


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("how", ["listed", "an item", "followed"])
async def test_a_mask_is_not_taken_for_the_rights_of_the_group(tmp_path: Path, kind: str, how: str) -> None:
    """What a program shows as the group's rights is the mask; the group itself has none of them."""
    with on(kind, tmp_path) as engine:
        for name, somebody, group, mask, other in (
            ("secret", 4, 0, 4, 0),
            ("shared", 6, 4, 6, 4),
            ("known", 4, 4, 4, 0),
        ):
            path = engine.source / name
            path.write_bytes(b"content")
            path.chmod(0o600)
            os.setxattr(path, ACCESS, access_list(6, somebody, group, mask, other))
        (engine.source / "plain").write_bytes(b"content")
        (engine.source / "plain").chmod(0o640)
        modes = {path.name: path.stat().st_mode & 0o777 for path in engine.source.iterdir()}
        assert modes == {"secret": 0o640, "shared": 0o664, "known": 0o640, "plain": 0o640}
        if how != "listed":
            engine.items = [TaskItem(source_path=f"/{name}", destination_path=f"/{name}") for name in modes]
        if how == "followed":
            # Kept apart, and reached by links.
            (engine.source / "apart").mkdir()
            for name in modes:
                (engine.source / name).rename(engine.source / "apart" / name)
                (engine.source / name).symlink_to(f"apart/{name}")
            engine.options = msgspec.structs.replace(WANTED, recursive_symlinks="copy")
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        found = {path.name: path.stat().st_mode & 0o777 for path in engine.destination.iterdir() if path.is_file()}
        assert found == {"secret": 0o600, "shared": 0o644, "known": 0o640, "plain": 0o640}


@needs_root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
async def test_a_destination_folder_gives_what_its_owner_says(tmp_path: Path, kind: str) -> None:
    """The default list of a folder at the destination is its owner's policy; new files have it, within their mode."""
    with on(kind, tmp_path) as engine:
        (engine.source / "open").write_bytes(b"content")
        (engine.source / "open").chmod(0o644)
        (engine.source / "closed").write_bytes(b"content")
        (engine.source / "closed").chmod(0o600)
        os.setxattr(engine.destination, DEFAULT, access_list(7, 7, 5, 7, 5))
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert observed.counters.xattrs_left_out == 0
        for name, mask in (("open", 4), ("closed", 0)):
            rows = list(struct.iter_unpack("<HHI", os.getxattr(engine.destination / name, ACCESS)[4:]))
            assert (0x02, 7, SOMEBODY) in rows
            assert (0x10, mask, 2**32 - 1) in rows


@pytest.mark.parametrize(
    ("found", "mode"),
    [
        (access_list(6, 6, 4, 6, 0), 0o640),
        (access_list(6, 6, 7, 6, 4), 0o660),
        # What cannot be understood is no mode: whoever lists it narrows it, and says so.
        (access_list(6, 6, 4, 6, 0)[:3], None),
        (access_list(6, 6, 4, 6, 0)[:20], None),
        (struct.pack("<I", 3) + access_list(6, 6, 4, 6, 0)[4:], None),
        (struct.pack("<I", 2), None),
        (OSError(errno.ENODATA, ""), 0o660),
        (OSError(errno.ENOTSUP, ""), 0o660),
        (OSError(errno.ENOSYS, ""), 0o660),
    ],
)
def test_lists_that_cannot_be_read_give_nothing(
    monkeypatch: pytest.MonkeyPatch, found: bytes | OSError, mode: int | None
) -> None:
    def answer(_file: object) -> bytes:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(attributes, "_list_of", answer)
    if mode is None:
        with pytest.raises(OSError, match="Invalid argument") as raised:
            attributes.mode_without_list(0, 0o660)
        assert raised.value.errno == errno.EINVAL
        return
    assert attributes.mode_without_list(0, 0o660) == mode

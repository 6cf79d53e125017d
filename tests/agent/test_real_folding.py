"""Destinations on real file systems that take names for one which differ in case: those of the kernel where it has any,
and those that run as programs (exFAT and NTFS with FUSE). What else some of them cannot keep is counted."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from agent.storage.access_lists import ACCESS, DEFAULT, AccessList
from agent.transfer.planning.hard_links import CODE as NOT_LINKED
from protocol.control import TaskOptions
from tests.agent.engine_inside import CHECKED, Engine, contents, skipped, tree

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
# How each is made, and how it is mounted.
REAL = {
    "ext4": (["mkfs.ext4", "-q", "-F", "-O", "casefold"], ["-o", "loop"]),
    "vfat": (["mkfs.vfat"], ["-o", "loop,utf8"]),
    "exfat": (["mkfs.exfat"], ["-t", "exfat", "-o", "loop"]),
    "exfat with FUSE": (["mkfs.exfat"], ["-t", "exfat-fuse", "-o", "loop"]),
    "ntfs with FUSE": (["mkntfs", "-q", "-F"], ["-t", "lowntfs-3g", "-o", "loop,ignore_case"]),
}
# This one tells case apart, and drops dots at the end all the same.
VFAT_WITH_CASE = (["mkfs.vfat"], ["-o", "loop,iocharset=utf8"])
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for mounts")


@contextmanager
def mounted(base: Path, kind: str) -> Iterator[Path]:
    """A small disk that folds names; skips with the reason where there can be none."""
    make, mount = REAL.get(kind, VFAT_WITH_CASE)
    image, place = base / "image", base / "disk"
    with image.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    place.mkdir()
    try:
        made = subprocess.run([*make, image], capture_output=True)
        done = subprocess.run(["mount", *mount, image, place], capture_output=True)
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not installed")
    if made.returncode or done.returncode:
        pytest.skip(f"no {kind} that folds names can be mounted: {(made.stderr + done.stderr).decode().strip()}")
    try:
        target = place / "folder"
        target.mkdir()
        if kind == "ext4":
            subprocess.run(["chattr", "+F", target], check=True)
        yield target
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("kind", REAL)
async def test_collisions_on_a_real_file_system_that_folds(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path, kind) as target:
        engine = Engine(tmp_path, TaskOptions(verify_checksum=True))
        engine.destination = target
        tree(engine.source, ["README", "readme", "other", "Docs/a", "docs/b", COMPOSED, COMPOSED.upper()])
        observed = await engine.run()
        assert (observed.state, observed.counters.failed) == ("FAILED", 3)
        # The first in the order of bytes has the name.
        lost = dict.fromkeys(["readme", "docs", COMPOSED], "NAME_COLLISION")
        if kind == "vfat":
            # Two names to this one, which have one short name all the same.
            lost[COMPOSED] = "EXISTS"
        assert skipped(engine) == lost
        for name in ("README", "other", "Docs/a", COMPOSED.upper()):
            assert (target / name).read_text() == f"content of {name}"
        assert len(list(target.iterdir())) == 4
        # Nothing of a folder was made before it was known.
        first = next(call.number for call in engine.calls if call.operation in ("rename", "mkdir"))
        probes = [call.number for call in engine.calls if call.name.endswith((b".README", b".readme"))]
        assert probes
        assert max(probes) < first
        print(f"{kind}: collisions {observed.counters.failed}")
        if "README" not in os.listdir(target):
            # This one lists other names than it was given; which of them a second run gives way to is its affair.
            return
        # Once more, as a mirror: what is there under another spelling is the source's, and stays.
        again = Engine(tmp_path, TaskOptions(verify_checksum=True, delete_destination_extra=True, sync_level=3))
        again.destination, again.state = target, tmp_path / "again"
        (target / "extra").write_text("extra")
        observed = await again.run()
        assert (observed.counters.deleted, observed.counters.files_transferred) == (1, 0)
        assert sorted(os.listdir(target)) == sorted(["README", "other", "Docs", COMPOSED.upper()])


@pytest.mark.parametrize("kind", [*REAL, "vfat with case"])
async def test_names_that_differ_by_a_dot_at_the_end_are_told_apart_or_collide(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path, kind) as target:
        engine = Engine(tmp_path, msgspec.structs.replace(CHECKED, delete_destination_extra=True, sync_level=3))
        engine.destination = target
        tree(engine.source, ["dots", "dots.", "alone."])
        await engine.run()
        assert (target / "dots").read_text() == "content of dots"
        names = set(os.listdir(target))
        expected = {"dots."} if names == {"dots", "alone"} else set()
        assert set(skipped(engine)) == expected
        assert len(names) == 3 - len(expected)
        # Once more: what has lost its dot is the source's, and stays.
        again = Engine(tmp_path, engine.options)
        again.destination, again.state = target, tmp_path / "again"
        observed = await again.run()
        assert (set(os.listdir(target)), observed.counters.deleted) == (names, 0)
        print(f"{kind}: {sorted(names)}")


@pytest.mark.parametrize("kind", ["vfat", "exfat", "exfat with FUSE"])
async def test_what_such_a_file_system_cannot_keep_is_counted(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path, kind) as target:
        options = msgspec.structs.replace(CHECKED, preserve_hard_links=True, preserve_xattrs=True, preserve_acls=True)
        engine = Engine(tmp_path, options)
        engine.destination = target
        tree(engine.source, ["one", "folder/inner"])
        os.link(engine.source / "one", engine.source / "two")
        try:
            os.setxattr(engine.source / "one", "user.colour", b"green")
            os.setxattr(engine.source / "folder", DEFAULT, AccessList(7, 5, 0).packed())
            os.setxattr(engine.source / "folder" / "inner", ACCESS, AccessList(6, 4, 0, mask=4).packed())
        except OSError as error:
            assert error.errno == errno.ENOTSUP
            pytest.skip("the source keeps no extended attributes or access lists here")
        observed = await engine.run()
        assert observed.state == "SUCCEEDED", observed
        assert contents(target) == contents(engine.source)
        counters = observed.counters
        assert (counters.hard_links, counters.hard_links_kept, counters.xattrs_left_out) == (2, 0, 2)
        assert (counters.acls_kept, counters.acls_not_kept, counters.acls_refused) == (0, 0, 2)
        assert (engine.codes().count(NOT_LINKED), engine.codes().count("ATTRIBUTES_LEFT_OUT")) == (1, 1)
        assert engine.codes().count("ACCESS_LISTS_NOT_KEPT") == 1
        assert engine.temporaries() == []

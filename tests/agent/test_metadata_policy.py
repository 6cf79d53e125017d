"""What of a file's properties is taken over and what is not, counted: hard links, special modes, extended attributes,
and times of folders, which are set last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.control import TaskItem
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path

__all__ = ["quick_path"]

MIB = 1024 * 1024


@pytest.mark.parametrize("by_items", [False, True])
async def test_what_is_not_taken_over_is_counted(quick_path: Path, *, by_items: bool) -> None:
    engine = Engine(quick_path)
    names = {"plain": 0o644, "setuid": 0o4755, "setgid": 0o2755, "sticky": 0o1644, "large-setuid": 0o6711}
    for name, mode in names.items():
        path = engine.source / name
        path.write_bytes(os.urandom(2 * MIB if name.startswith("large") else 100))
        path.chmod(mode)
    for name in ("second", "third"):
        os.link(engine.source / "plain", engine.source / name)
    try:
        os.setxattr(engine.source / "plain", "user.origin", b"elsewhere")
        os.setxattr(engine.source / "setuid", "user.origin", b"elsewhere")
    except OSError:
        pytest.skip("this file system keeps no extended attributes")
    if by_items:
        found = sorted(path.name for path in engine.source.iterdir())
        engine.items = [TaskItem(source_path=f"/{name}", destination_path=f"/{name}") for name in found]
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    for path in engine.destination.iterdir():
        status = path.stat()
        assert status.st_mode & 0o7000 == 0, path
        # Every name is a file of its own: writing to one changes no other.
        assert status.st_nlink == 1, path
        assert [name for name in os.listxattr(path) if not name.startswith("security.")] == [], path
        assert status.st_mtime_ns == (engine.source / path.name).stat().st_mtime_ns
    assert (observed.counters.hard_links, observed.counters.special_modes) == (3, 4)
    print(f"hard links: {observed.counters.hard_links}, special modes left out: {observed.counters.special_modes}")


@pytest.mark.parametrize("policy", ["ignore", "keep", "copy"])
async def test_symlinks_by_policy_are_all_counted(quick_path: Path, policy: Any) -> None:
    """Left out, kept as they are whatever they say, or followed inside the root, and never out of it."""
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, recursive_symlinks=policy))
    (quick_path / "outside").mkdir()
    (quick_path / "outside" / "secret").write_bytes(b"secret")
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"content")
    links = {
        "to-file": "folder/file",
        "to-folder": "folder",
        "chain": "to-file",
        "absolute-inside": str(engine.source / "folder" / "file"),
        "nowhere": "missing",
        "out": "../outside/secret",
        "out-folder": "../outside",
        "absolute-out": "/etc/passwd",
        "circle": "circle",
    }
    for name, target in links.items():
        (engine.source / name).symlink_to(target)
    observed = await engine.run()
    there = contents(engine.destination)
    counters = observed.counters
    plain: dict[str, bytes | str] = {"folder": "folder", "folder/file": b"content"}
    if policy == "copy":
        followed = dict.fromkeys(("to-file", "chain", "absolute-inside"), b"content")
        assert there == {**plain, **followed, "to-folder": "folder", "to-folder/file": b"content"}
        left_out = 5
        assert (counters.symlinks, counters.files, counters.directories) == (left_out, 5, 3)
    else:
        kept = {name: f"link to {target}" for name, target in links.items()} if policy == "keep" else {}
        assert there == {**plain, **kept}
        assert (counters.symlinks, counters.symlinks_transferred) == (len(links), len(kept))
    assert observed.state == "SUCCEEDED", observed
    assert not any(b"secret" in content for content in there.values() if isinstance(content, bytes))
    print(f"{policy}: {len(links)} links, counted {counters.symlinks}, kept {counters.symlinks_transferred}")


async def test_times_of_folders_are_set_last(quick_path: Path) -> None:
    """After everything in them, after what a mirror deletes, and children before parents."""
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, delete_destination_extra=True))
    for number, folder in enumerate(("a", "a/b", "a/b/c", "d")):
        (engine.source / folder).mkdir()
        (engine.source / folder / "file").write_bytes(b"content")
        (engine.destination / folder).mkdir()
        (engine.destination / folder / "extra").write_bytes(b"extra")
        for place in (engine.source / folder, engine.destination / folder):
            os.utime(place, ns=(10**18, 10**18 + number))
    times = {path.relative_to(engine.source): 10**18 + path.stat().st_ino for path in engine.source.rglob("*")}
    for path in sorted(engine.source.rglob("*"), reverse=True):
        os.utime(path, ns=(10**18, times[path.relative_to(engine.source)]))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    for name, time in times.items():
        assert (engine.destination / name).stat().st_mtime_ns == time, name
    steps = [call.operation for call in engine.calls if call.operation in ("rename", "unlink", "mkdir", "set_times")]
    assert steps[-4:] == ["set_times"] * 4
    assert "set_times" not in steps[:-4]

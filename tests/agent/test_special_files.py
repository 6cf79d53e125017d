"""Devices, pipes and sockets at the source, which have no content to bring over; and what stands where links are to be,
with the sync level that leaves alone what is there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest

from protocol.control import TaskItem, TaskOptions
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path, skipped

__all__ = ["quick_path"]


@pytest.mark.parametrize("policy", ["ignore", "keep", "copy"])
async def test_special_files_in_a_folder_are_left_out_and_listed_and_fail_nothing(
    quick_path: Path, policy: str
) -> None:
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, recursive_symlinks=policy))
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"content")
    os.mkfifo(engine.source / "folder" / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(engine.source / "socket"))
    (engine.source / "link").symlink_to("folder/pipe")
    observed = await engine.run()
    counters = observed.counters
    left_out = ["folder/pipe", "socket", *(["link"] if policy == "copy" else [])]
    assert (observed.state, counters.failed, counters.skipped_errors) == ("SUCCEEDED", 0, len(left_out))
    assert skipped(engine) == dict.fromkeys(left_out, "UNSUPPORTED_TYPE")
    assert engine.codes().count("UNSUPPORTED_TYPE") == len(left_out)
    assert contents(engine.destination)["folder/file"] == b"content"
    print(f"symlinks {policy}: left out {sorted(left_out)}")


async def test_a_special_file_that_is_named_fails(quick_path: Path) -> None:
    engine = Engine(quick_path, items=[TaskItem(source_path="/pipe", destination_path="/pipe")])
    os.mkfifo(engine.source / "pipe")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert skipped(engine) == {"pipe": "UNSUPPORTED_TYPE"}


async def test_a_mirror_keeps_what_is_called_like_a_special_file(quick_path: Path) -> None:
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, delete_destination_extra=True))
    os.mkfifo(engine.source / "name")
    (engine.destination / "name").write_bytes(b"of somebody")
    (engine.destination / "other").write_bytes(b"extra")
    observed = await engine.run()
    assert (observed.state, observed.counters.deleted) == ("SUCCEEDED", 1)
    assert contents(engine.destination) == {"name": b"of somebody"}


@pytest.mark.parametrize("by_items", [False, True])
async def test_a_link_takes_nobodys_place_where_what_exists_is_left_alone(quick_path: Path, *, by_items: bool) -> None:
    engine = Engine(quick_path, TaskOptions(recursive_symlinks="keep", sync_level=0))
    names = ["file", "link", "new"]
    for name in names:
        (engine.source / name).symlink_to("where-the-source-says")
    (engine.destination / "file").write_bytes(b"of somebody")
    (engine.destination / "link").symlink_to("elsewhere")
    if by_items:
        engine.items = [TaskItem(source_path=f"/{name}", destination_path=f"/{name}", symlink=True) for name in names]
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "file").read_bytes() == b"of somebody"
    assert os.readlink(engine.destination / "link") == "elsewhere"
    assert os.readlink(engine.destination / "new") == "where-the-source-says"
    assert (observed.counters.symlinks, observed.counters.symlinks_transferred) == (3, 1)
    assert (observed.counters.files, observed.counters.files_skipped) == (0, 0)

"""Modes that keep the owner out of a file: durable before it has its name, so that no power failure leaves another."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from agent.storage import libc
from agent.storage.faulty import Call
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path

__all__ = ["quick_path"]

MODES = (0o000, 0o040, 0o200, 0o244, 0o400, 0o444, 0o600, 0o640, 0o755)
NAMES = {f"file-{mode:03o}": mode for mode in MODES}


def filled(engine: Engine, *, attributes: bool) -> None:
    for name, mode in NAMES.items():
        path = engine.source / name
        path.write_bytes(name.encode())
        if attributes:
            os.setxattr(path, "user.colour", b"green")
        path.chmod(mode)


@pytest.mark.parametrize(("processes", "attributes"), [(0, False), (0, True), (1, False)])
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "disk"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "closed"])
async def test_a_name_is_given_to_what_has_its_mode_durably(
    quick_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    attributes: bool,
    whole: bool,
    keep: bool,
) -> None:
    """Whether a disk is synced as a whole or each file alone, whoever wrote it, and with its descriptor kept or not."""
    if not whole:
        monkeypatch.setattr(libc, "has_syncfs", lambda: False)
    if not keep:
        monkeypatch.setattr("agent.transfer.settling.small_files._OTHER_DESCRIPTORS", 1 << 30)
        monkeypatch.setattr("agent.transfer.lane_processes.lane_process._OTHER_DESCRIPTORS", 1 << 30)
    options = msgspec.structs.replace(CHECKED, preserve_xattrs=attributes)
    synced: dict[int, int] = {}
    fsync = os.fsync

    def syncing(fd: int) -> None:
        note(os.fstat(fd))
        fsync(fd)

    def note(status: os.stat_result) -> None:
        synced[status.st_ino] = stat.S_IMODE(status.st_mode)

    def plan(call: Call) -> int | None:
        if call.operation == "sync_disk":
            for path in engine.destination.glob(".towpath.*"):
                # One that has its name by now was synced before.
                with suppress(FileNotFoundError):
                    note(path.stat())
        return None

    monkeypatch.setattr(os, "fsync", syncing)
    engine = Engine(quick_path, options, plan=plan, processes=processes, permitted=0o777)
    filled(engine, attributes=attributes)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in engine.destination.iterdir()} == NAMES
    # When they still had no names.
    assert {name: synced.get((engine.destination / name).stat().st_ino) for name in NAMES} == NAMES
    if attributes:
        assert {os.getxattr(path, "user.colour") for path in engine.destination.iterdir()} == {b"green"}

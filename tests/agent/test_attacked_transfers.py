"""Somebody with an account on the machine swaps folders for links out of the collection while a transfer runs, at
either end and at every step of it: nothing outside the root is changed, and nothing outside is read."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.storage.faulty import Call
from protocol.control import TaskItem, TaskOptions
from tests.agent.engine_inside import Engine, quick_path
from tests.agent.engine_world import world
from tests.agent.hostile_grounds import SECRET, Attacker, Grounds
from tests.slices import part

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")

MIB = 1024 * 1024
OPTIONS = TaskOptions(
    verify_checksum=True,
    preserve_timestamp=True,
    recursive_symlinks="keep",
    delete_destination_extra=True,
    delete_destination_extra_limit=1000,
)
# Hard links and extended attributes as well.
KEEPING = TaskOptions(
    verify_checksum=True, preserve_hard_links=True, preserve_xattrs=True, delete_destination_extra=True
)
FOLLOWING = TaskOptions(verify_checksum=True, recursive_symlinks="copy")
# Swaps while a transfer between real workers runs, and seconds after each.
SWAPS, PAUSE = 400, 0.002


def tempting(folder: Path, content: bytes, large: int) -> None:
    """The same names everywhere, so that a step that is led astray finds what it looks for."""
    (folder / "inner").mkdir(parents=True, exist_ok=True)
    for name in ("f", "canary", "inner/f"):
        (folder / name).write_bytes(content)
    (folder / "large").write_bytes(content * (large // len(content)))
    (folder / "inner" / "link").symlink_to("f")
    os.link(folder / "f", folder / "inner" / "twin")
    with contextlib.suppress(OSError):
        os.setxattr(folder / "f", "user.origin", content)
        os.setxattr(folder / "inner", "user.origin", content)


class Attacked:
    """Source and destination with ``victim`` in both, and in one of them ``evil``, a link to the canaries."""

    def __init__(self, base: Path, side: str, large: int = MIB + 1000) -> None:
        (base / "grounds").mkdir(parents=True)
        self.grounds = Grounds(base / "grounds")
        tempting(self.grounds.outside, SECRET, large)
        # Extras to a mirror.
        (self.grounds.outside / "only-outside").write_bytes(SECRET)
        self.grounds.before = self.grounds.snapshot()
        self.other = base / "other"
        self.source = self.grounds.inside if side == "source" else self.other
        self.destination = self.other if side == "source" else self.grounds.inside
        tempting(self.source / "victim", b"content of the source", large)
        tempting(self.destination / "victim", b"older content", 1000)
        (self.destination / "victim" / "extra").write_bytes(b"extra")
        (self.grounds.inside / "evil").symlink_to(self.grounds.outside)
        names = (self.grounds.inside / "victim", self.grounds.inside / "evil")
        self.attacker = Attacker(*names, most=SWAPS, pause=PAUSE)
        # Its own first swap was a trial.
        self.attacker.swap()

    def check(self, what: str) -> None:
        assert self.grounds.snapshot() == self.grounds.before, what
        assert _origins(self.grounds.outside) <= {SECRET}, what
        assert SECRET not in _origins(self.destination), f"{what}: an attribute was read from outside"
        for path in self.destination.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert SECRET not in path.read_bytes(), f"{what}: {path} was read from outside"


def _origins(root: Path) -> set[bytes]:
    """What the attributes of files and folders say."""
    found = set()
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            found.add(os.getxattr(path, "user.origin", follow_symlinks=False))
    return found


def attacked_engine(
    base: Path, scene: Attacked, options: TaskOptions, plan: Callable[[Call], None], side: str
) -> Engine:
    def planned(call: Call) -> int | None:
        plan(call)
        return None

    if options is FOLLOWING:
        items = [TaskItem(source_path="/victim", destination_path="/victim", recursive=True)]
    else:
        # Only the folder: the attacker's link beside it belongs to nobody's task.
        items = [
            TaskItem(source_path="/victim", destination_path="/victim", recursive=True),
            TaskItem(source_path="/victim/f", destination_path="/victim/inner/single"),
        ]
    engine = Engine(base, options, items, lanes_wanted=1)
    if side == "source":
        engine.source_plan = planned
    else:
        engine.plan = planned
    engine.source, engine.destination = scene.source, scene.destination
    return engine


async def calls_of(base: Path, options: TaskOptions, side: str) -> list[Call]:
    """The calls of an undisturbed transfer."""
    calls: list[Call] = []
    scene = Attacked(base, side)
    engine = attacked_engine(base, scene, options, calls.append, side)
    assert (await engine.run()).state == "SUCCEEDED"
    scene.check("undisturbed")
    return calls


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("side", ["destination", "source"])
@pytest.mark.parametrize("options", [OPTIONS, FOLLOWING, KEEPING], ids=["mirror", "following", "keeping"])
async def test_a_folder_is_swapped_for_a_link_before_a_call(
    quick_path: Path, side: str, options: TaskOptions, every: int
) -> None:
    calls = await calls_of(quick_path / "plain", options, side)
    ends: Counter[str] = Counter()
    for number in part(range(1, len(calls) + 1, every)):
        base = quick_path / str(number)
        scene = Attacked(base, side)
        seen: list[Call] = []

        def swap(call: Call, number: int = number, scene: Attacked = scene, seen: list[Call] = seen) -> None:
            seen.append(call)
            if len(seen) == number:
                scene.attacker.swap()

        engine = attacked_engine(base, scene, options, swap, side)
        observed = await engine.run()
        what = f"swapped before call {number} ({calls[number - 1].operation}) of the {side}: {observed}"
        scene.check(what)
        ends[observed.state] += 1
        if observed.state != "SUCCEEDED":
            assert set(engine.codes()) & {"PERMISSION_DENIED", "FILE_CHANGED", "NOT_A_DIRECTORY", "FILE_NOT_FOUND"}, (
                what
            )
    assert set(ends) <= {"SUCCEEDED", "FAILED"}
    assert ends["FAILED"] > 0
    print(f"{side}: swapped before every {every}. of {len(calls)} calls, {dict(ends)}, outside as it was")


@pytest.mark.parametrize("side", ["destination", "source"])
async def test_folders_are_swapped_all_the_time_while_real_workers_transfer(tmp_path: Path, side: str) -> None:
    scene = Attacked(tmp_path / "scene", side, 24 * MIB)
    for name, folder in (("alpha", scene.source), ("beta", scene.destination)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "root").symlink_to(folder)
    async with world(tmp_path) as made:
        task = await made.submit([TaskItem(source_path="/victim", destination_path="/victim", recursive=True)], OPTIONS)
        with scene.attacker:
            observed = await made.wait(task)
            while scene.attacker.swaps < SWAPS:
                await trio.sleep(0.01)
        scene.check(f"{scene.attacker.swaps} swaps at the {side}")
        assert scene.attacker.swaps == SWAPS
        print(f"{side}: {SWAPS} swaps during a transfer that ended {observed.state}, outside as it was")


@pytest.mark.parametrize("side", ["destination"])
async def test_a_folder_is_swapped_before_every_call_of_a_deletion(quick_path: Path, side: str) -> None:
    total, number = 10**6, 0
    while number < total:
        number += 1
        scene = Attacked(quick_path / str(number), side)
        seen: list[Call] = []

        def plan(call: Call, number: int = number, scene: Attacked = scene, seen: list[Call] = seen) -> int | None:
            seen.append(call)
            if len(seen) == number:
                scene.attacker.swap()
            return None

        items = [TaskItem(source_path="/victim")]
        engine = Engine(quick_path / str(number), TaskOptions(recursive=True), items, type="DELETE", plan=plan)
        engine.destination = scene.destination
        observed = await engine.run()
        assert observed.state in ("SUCCEEDED", "FAILED"), observed
        scene.check(f"swapped before call {number}: {observed}")
        total = len(seen)
    assert number > 10
    print(f"deletion: swapped before each of {number} calls, outside as it was")


async def test_a_folder_that_became_a_link_outside_does_not_hold_up_its_times(quick_path: Path) -> None:
    """After the last file, before the times of folders: what cannot be done any more is left out, not waited for."""
    scene = Attacked(quick_path, "destination")

    def swap(call: Call) -> int | None:
        if call.operation == "set_times" and call.name == b"inner" and not swapped:
            swapped.append(call)
            scene.attacker.swap()
        return None

    swapped: list[Call] = []
    engine = attacked_engine(quick_path, scene, OPTIONS, swap, "destination")
    observed = await engine.run()
    assert swapped
    assert observed.state == "SUCCEEDED", observed
    scene.check("swapped before the times of folders")


def test_the_attack_is_real(quick_path: Path) -> None:
    """A program that joins paths is fooled by the same swap."""
    scene = Attacked(quick_path, "destination")
    scene.attacker.swap()
    with open(os.path.join(scene.destination, "victim", "f"), "wb") as file:
        file.write(b"overwritten")
    assert scene.grounds.snapshot() != scene.grounds.before
